"""The commands: names, defaults, and each bad input as one line, exit code 2, nothing written."""

import gzip
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_kit import invoke
from harvest_kit import build_model, texts

from sae_granary import open_cache
from sae_granary.common.errors import ConfigError
from sae_granary.harvest.cli import app
from sae_granary.harvest.config import HarvestConfig, default_name
from sae_granary.harvest.settings.make import make_config
from sae_granary.models.config import ModelConfig, WhereConfig, parse_layers

Run = Callable[..., str]
REPO = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "bert-base-uncased", "bert")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path, decoder: Path) -> Run:
    """Run a command in an empty working directory with `bert-base-uncased/`, `llama/` and `text.jsonl` in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert-base-uncased").symlink_to(model)
    (tmp_path / "llama").symlink_to(decoder)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"body": text, "n": 1}) + "\n" for text in texts(20)))

    return lambda line, code=0: invoke(app, *shlex.split(line), code=code).output


BERT = "run --model bert-base-uncased --device cpu"
TEXT = "--dataset text.jsonl"


def bad_data(folder: Path) -> None:
    """`bad/`: files without text; `a_cache/`: what says that it is a cache."""
    for name, text in {
        "bad/empty.txt": "",
        "bad/blank.txt": " \n\n",
        "bad/no.jsonl": "one\n[2]\n",
        "a_cache/manifest.json": '{"format": "granary-activations"}',
    }.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def test_broken_lines_are_counted_by_name(run: Run, tmp_path: Path) -> None:
    lines = ['{"text": "one two"}', '{"text": "one', "7", '{"text": null}', '{"text": "red"}']
    (tmp_path / "broken.jsonl").write_text("\n".join(lines))
    output = run(f"{BERT} --layer 2 --dataset broken.jsonl")
    assert re.search(r"skipped +1 none, 2 not json", output), output


def test_a_data_set_of_which_nothing_is_left_says_why(run: Run, tmp_path: Path) -> None:
    (tmp_path / "late.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a\\u0000b"}\n{"text": null}\n'))
    (tmp_path / "late.txt.gz").write_bytes(gzip.compress(b"a\0b"))
    output = run(f"{BERT} --layer 2 --dataset late.jsonl.gz", code=2)
    assert "holds no text in text in its first 2 records (1 none, 1 binary)" in output.replace("\n", " ")
    output = run(f"{BERT} --layer 2 --dataset late.txt.gz", code=2)
    assert "no rows were harvested from dataset late.txt.gz: all its records were skipped (1 binary)" in output
    assert not (tmp_path / "cache" / "bert_l2").exists()


def test_the_default_name_and_a_whole_harvest(run: Run, tmp_path: Path) -> None:
    output = run(f"{BERT} --layer 2 {TEXT} --max-tokens 200")
    assert "rows" in output
    assert "documents" in output
    got = open_cache(tmp_path / "cache" / "bert_l2")
    assert got.complete
    assert got.n_rows >= 200
    assert "already complete, nothing to do" in run(f"{BERT} --layer 2 {TEXT} --max-tokens 200")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            f"run --model some-model --layer 1 {TEXT}",
            r"unknown model 'some-model': there is no network.*local path.*demo",
        ),
        (f"run --model ./missing --layer 1 {TEXT}", r"there is no folder \./missing"),
        (f"run --model . --layer 1 {TEXT}", r"the folder \. holds no model"),
        (f"{BERT} --layer 3 {TEXT}", r"error: layer 3 is out of range: the model has 3 layers, 0 to 2"),
        (f"{BERT} --layer -1 {TEXT}", r"error: layer -1 is out of range: the model has 3 layers"),
        (f"{BERT} {TEXT}", r"nothing to harvest is named: give --layer 6"),
        (
            f"{BERT} --hook encoder.layer.1.atention {TEXT}",
            r"is not a module of BertModel; .*, did you mean 'encoder\.layer\.1",
        ),
        (
            f"{BERT} --hook encoder.layers.*.atention {TEXT}",
            r"is not a module of BertModel; .*, did you mean 'encoder\.layer\.\*\.attention",
        ),
        (f"{BERT} --hook embeddings:out {TEXT}", r"only ':in'"),
        (f"{BERT} --hook pooler {TEXT}", r"pooler \(output\) gives a tensor of shape .*expected one vector per token"),
        (f"{BERT} --layer 1 {TEXT} --text-column text", r"no column 'text'; its columns are body, n: .*--text-column"),
        (f"{BERT} --layer 1 --dataset nothing.txt", r"there is no file or folder nothing\.txt"),
        (f"{BERT} --layer 1 --dataset some/data", r"not reachable: there is no network.*local path.*demo"),
        (f"{BERT} --layer 1 {TEXT} --dtype float23", r"dtype='float23': expected one of .*, did you mean 'float32'"),
        (f"{BERT} --layer 1 {TEXT} --device tpu", r"device 'tpu' is unknown: expected auto, cpu, cuda, cuda:N or mps"),
        (f"{BERT} --layer 1 {TEXT} --ctx-len 999", r"--ctx-len is 999, but the model takes at most 128 tokens"),
        (f"{BERT} --layer 1 {TEXT} --ctx-len 2", r"--ctx-len is 2, but each context holds 2 special tokens"),
        (f"{BERT} --layer 1 {TEXT} --pack", r"--pack joins documents for decoders; an encoder would attend across"),
        (f"{BERT} --layer 1 {TEXT} --bos", r"--bos: the tokenizer has no BOS token"),
        (f"{BERT} --layer 1 {TEXT} --batch-tokens 8", r"--batch-tokens is 8: expected at least one context of --ctx-"),
        (
            f"{BERT} --layer 1 {TEXT} --rows-per-shard 8",
            r"--rows-per-shard is 8: expected at least one context of --ctx-len 128",
        ),
        (
            f"{BERT} --layer 1 --dataset - --max-tokens 900T",
            r"not enough space for .*bytes are planned and .* are free",
        ),
        (f"{BERT} --layer 1 {TEXT} --out text.jsonl", r"text\.jsonl is a file, expected a folder; use another --out"),
        (f"{BERT} --layer 1 {TEXT} --out other", r"other holds something that is not a cache \(thesis\.txt\)"),
        (f"{BERT} --layer 1 {TEXT} --out text.jsonl/a/b", r"--out text\.jsonl/a/b cannot be made: .*jsonl is a file"),
        (f"{BERT} --layer 1 {TEXT} --out a/{'x' * 300}/b", r"--out has a folder name of 300 bytes .* at most 255"),
        (f"{BERT} --layer 1 {TEXT} --out {'x/' * 1990}", r"--out is a path of \d+ bytes: at most 3800 fit"),
        (f"{BERT} --layer 1 {TEXT} --out 'a\nb'", r"out is 'a\\nb': it holds a newline or control character"),
        (f"{BERT} --layer 1 {TEXT} --out ''", r"out is empty: expected the path of a folder"),
        (f"{BERT} --layer 1 --dataset ''", r"--dataset is empty: give a hub id, a local file"),
        (f"{BERT} --layer 1 --dataset demo --split test", r"--split test does not apply to --dataset demo"),
        (
            f"{BERT} --layer 1 --dataset - --split test",
            r"--split test does not apply to --dataset - \(standard input\)",
        ),
        (
            f"{BERT} --layer 1 {TEXT} --split foo",
            r"--split foo does not apply to --dataset text\.jsonl \(local files\)",
        ),
        (f"{BERT} --layer 1 {TEXT} --documents line", r"--documents line does not apply to --dataset text\.jsonl"),
        (
            f"{BERT} --layer 1 --dataset other --text-column a",
            r"--text-column a does not apply to --dataset other \(plain text, which has no",
        ),
        (f"{BERT} --layer 1 {TEXT} --text-column n", r"holds no text in n in its first 20 .*\(20 not text\).*are body"),
        (f"{BERT} --layer 1 --dataset bad/empty.txt", r"bad/empty\.txt is an empty file: give a file with text"),
        (
            f"{BERT} --layer 1 --dataset bad/blank.txt",
            r"no rows were harvested from dataset bad/blank\.txt: .*skipped \(1 empty\); give data with text$",
        ),
        (f"{BERT} --layer 1 --dataset /dev/null", r"/dev/null is neither a file nor a folder"),
        (f"{BERT} --layer 1 --dataset bad/no.jsonl", r"bad/no\.jsonl: none of its first 2 records is a JSON object"),
        (f"{BERT} --layer 1 --dataset a_cache", r"a_cache is an activation cache, not a dataset"),
        (f"{BERT} --layer 1 {TEXT} --text-column ''", r"text_columns='' is empty: give a value"),
        (f"{BERT} --layer 1 {TEXT} --max-tokens 0.5", r"max_tokens='0\.5': expected a whole number"),
        (f"{BERT} --unit text --layer 1 {TEXT}", r"--unit text stores one pooled embedding per text"),
        (f"plan --model bert-base-uncased --layer 9 {TEXT}", r"error: layer 9 is out of range"),
        ("names some-model", r"unknown model 'some-model'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(run: Run, tmp_path: Path, line: str, message: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    bad_data(tmp_path)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    output = run(line, code=2)
    (error,) = [part for part in output.splitlines() if part.startswith("error: ")]
    assert re.search(message, error), error
    assert "Traceback" not in output
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "out",
    ["cache", "cache/load", "cache/format", "cache/load/new/a", "cache/__pycache__", "mine", "train/new", "train/a/b"],
)
def test_a_cache_is_not_written_among_code(run: Run, tmp_path: Path, out: str) -> None:
    for package in ("cache", "train"):
        (tmp_path / package).symlink_to(REPO / package)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").touch()
    folders = [REPO / "train", REPO / "cache", *(REPO / "cache").glob("*/")]
    before = [sorted(folder.iterdir()) for folder in folders]
    for command in (BERT, "plan --model bert-base-uncased --device cpu"):
        output = run(f"{command} --layer 1 {TEXT} --out {out}", code=2)
        name = out.split("/")[1] if out.startswith("cache/") else out.split("/")[0]
        assert f"error: {out} belongs to Python code ({name}/), not to a cache; use another --out\n" in output
    assert [sorted(folder.iterdir()) for folder in folders] == before


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an Apple GPU")
@pytest.mark.parametrize("command", ["plan", "run"])
def test_an_apple_gpu_that_is_not_there_is_refused(run: Run, command: str) -> None:
    output = run(f"{command} --model bert-base-uncased --layer 1 {TEXT} --device mps", code=2)
    assert output == "error: device 'mps': PyTorch finds no Apple GPU on this machine; give cpu or auto\n"


def test_an_error_of_the_system_is_one_line(run: Run, tmp_path: Path) -> None:
    output = run(f"{BERT} --layer 1 --dataset {'x' * 300}.txt", code=2)
    assert re.search(r"^error: .*x.*: File name too long; ", output, re.MULTILINE), output
    (tmp_path / "nowhere").symlink_to("gone")
    assert "nowhere is a link to nothing" in run(f"{BERT} --layer 1 {TEXT} --out nowhere", code=2)


def test_a_model_with_its_own_code_needs_the_flag(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "custom"
    folder.mkdir()
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.MyConfig", "AutoModel": "code.MyModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('ran')")
    (folder / "model.safetensors").write_bytes(b"")
    output = run(f"run --model custom --layer 1 {TEXT}", code=2)
    assert "custom runs its own code: read it, then allow it with --trust-remote-code" in output


def test_a_model_without_weights_is_refused_before_anything_starts(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    shutil.copytree(tmp_path / "bert-base-uncased", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    output = run(f"run --model empty --layer 1 {TEXT}", code=2)
    assert "empty has a config but no weights" in output


def test_plan_tells_sizes_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    output = run(f"plan --model bert-base-uncased --layers all {TEXT} --device cpu")
    for word in ("rows", "bytes", "shards", "free space", "time", "layer_0 (32), layer_1 (32), layer_2 (32)"):
        assert word in output
    assert not (tmp_path / "cache").exists()
    run(f"{BERT} --layers all {TEXT}")
    assert f"{open_cache(tmp_path / 'cache' / 'bert_lall').n_rows:,} tokens (counted)" in output


def test_names_lists_layers_and_modules_with_widths(run: Run) -> None:
    output = run("names bert-base-uncased")
    assert "--layer 0 ... 2   output of encoder.layer.<i>" in output
    widths = dict(line.rsplit(maxsplit=1) for line in output.splitlines() if line.startswith("  "))
    widths = {name.strip(): width for name, width in widths.items()}
    assert (widths["encoder.layer.1.attention.output"], widths["encoder.layer.1.intermediate"]) == ("32", "64")
    assert "pooler" not in widths


def test_packed_windows_reach_the_cache(run: Run, tmp_path: Path) -> None:
    run(f"run --model llama --layer 1 {TEXT} --pack --ctx-len 32 --device cpu")
    got = open_cache(tmp_path / "cache" / "llama_l1")
    ids = got.column("token_id")[0 : got.n_rows]
    n_words = sum(len(text.split()) for text in texts(20))
    n_windows = int(got.column("window")[got.n_rows - 1]) + 1
    assert got.n_rows == n_words + 20 + n_windows  # a separator per document, a BOS per window
    assert (ids == 2).sum() == 20


@pytest.mark.parametrize(
    ("model_name", "where", "name"),
    [
        ("bert-base-uncased", WhereConfig(layers=(6,)), "bert_l6"),
        ("demo", WhereConfig(layers=(3,)), "demo_l3"),
        ("Qwen/Qwen3-0.6B", WhereConfig(layers=(2, 4)), "qwen3_l2-4"),
        ("./models/gpt2/", WhereConfig(layers="all"), "gpt2_lall"),
        ("gpt2", WhereConfig(layer_stride=2), "gpt2_lallx2"),
        ("sentence-transformers/all-MiniLM-L6-v2", WhereConfig(unit="text"), "all_text"),
        ("gpt2", WhereConfig(hooks=("h.*.attn:in",)), "gpt2_h.-.attn-in"),
    ],
)
def test_default_names(model_name: str, where: WhereConfig, name: str) -> None:
    assert default_name(model_name, where) == name
    assert HarvestConfig(ModelConfig(model_name), where).out_path == Path("cache") / name


def test_counts_and_layers_are_parsed() -> None:
    counts = {"20k": 20_000, "5M": 5_000_000, "1.5B": 1_500_000_000, "1_000": 1000, "7": 7}
    for text, count in counts.items():
        made = make_config({"model": "demo", "layers": 3, "max_tokens": text, "ctx_len": text})
        assert made.max_tokens == made.tokens.ctx_len == count
    assert parse_layers(["4,2", "2", "6"]) == (2, 4, 6)
    assert parse_layers(["all"]) == "all"
    with pytest.raises(ConfigError, match="includes every layer"):
        parse_layers(["all,2"])
