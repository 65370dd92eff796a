"""One cache, one source: whatever determines the rows is compared before a harvest is continued."""

import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cache_kit import edit_signed
from command_kit import run_python
from harvest_kit import CutOff, build_model, config_of, cut_off_after, texts

from sae_granary import open_cache
from sae_granary.cache.errors import CacheError
from sae_granary.harvest.config import HarvestConfig, TextConfig
from sae_granary.harvest.errors import HarvestError, SourceStoppedError
from sae_granary.harvest.run import harvest_activations
from sae_granary.harvest.text import local_files
from sae_granary.harvest.text.local_files import FileSource
from sae_granary.models.config_files import config_hash
from sae_granary.models.locate import Located


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def config(tmp_path: Path, model: Path) -> HarvestConfig:
    folder = shutil.copytree(model, tmp_path / "model")
    (tmp_path / "corpus.txt").write_text("\n".join(texts(120, longest=50)))
    sizes = {"ctx_len": 16, "batch_tokens": 32, "rows_per_shard": 512}
    return config_of(folder, tmp_path / "corpus.txt", tmp_path / "cache", **sizes)


def interrupt(config: HarvestConfig) -> int:
    """A harvest that is cut off; its committed rows."""
    with pytest.raises(CutOff), cut_off_after(60):
        harvest_activations(config, quiet=True)
    n_rows = open_cache(config.out_path, allow_incomplete=True).n_rows
    assert n_rows > 0
    return n_rows


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def as_before(cache: Path) -> None:
    """The manifest of a cache that was begun before the model configuration and the whole text were recorded."""

    def change(manifest: dict[str, Any]) -> None:
        for key in ("model_config_xxh3", "dataset_full_xxh3"):
            del manifest["fingerprint"][key]
        del manifest["provenance"]["dataset"]["dataset_full_xxh3"]

    edit_signed(cache / "manifest.json", change)


def test_a_model_whose_configuration_was_edited_is_another(config: HarvestConfig) -> None:
    interrupt(config)
    edit_json(Path(config.model.model) / "config.json", rope_theta=100.0)
    with pytest.raises(CacheError, match=r"model_config_xxh3"):
        harvest_activations(config, quiet=True)


FILES = (
    "config.json", "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "vocab.txt",
    "1_Pooling/config.json", "2_Router/a/config.json", "chat_template.jinja", "additional_chat_templates/rag.jinja",
    "modeling_own.py", "layers/own.py", "spiece.model", "tokenizer.json",
)  # fmt: skip
OTHERS = ("model.safetensors", "README.md", ".git/config.json", "checkpoint-5/config.json", "trainer_state.json")


def test_every_configuration_file_of_a_model_is_hashed(tmp_path: Path) -> None:
    for name in FILES + OTHERS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    paths = {"Transformer": "", "P": "1_Pooling", "R": "2_Router"}
    modules = tuple({"type": kind, "path": path} for kind, path in paths.items())
    located = Located("m", "m", str(tmp_path), modules=modules)
    seen = {config_hash(located)}
    for i, name in enumerate(FILES, 1):
        (tmp_path / name).write_text('{"edited": 1}')
        seen.add(config_hash(located))
        assert len(seen) == i + 1, name
    for name in OTHERS:
        (tmp_path / name).write_text('{"edited": 1}')
    assert config_hash(located) in seen


CONFIG_CODE = """from transformers import PretrainedConfig


class OwnConfig(PretrainedConfig):
    model_type = "own"
"""
HASH = """
import sys
from sae_granary.models.config import ModelConfig
from sae_granary.models.config_files import config_hash
from sae_granary.models.locate import locate
print(config_hash(locate(ModelConfig(sys.argv[1], trust_remote_code=True))))
"""


@pytest.mark.slow
def test_the_commit_of_code_in_another_repository_counts(tmp_path: Path) -> None:
    model, hub = tmp_path / "model", tmp_path / "home/hub/models--other--code"
    model.mkdir()
    auto_map = {"AutoConfig": "other/code--configuration_own.OwnConfig"}
    (model / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    (hub / "refs").mkdir(parents=True)
    found = []
    for commit in ("a" * 40, "b" * 40, "a" * 40):
        (hub / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        (hub / "snapshots" / commit / "configuration_own.py").write_text(CONFIG_CODE)
        (hub / "refs/main").write_text(commit)
        environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        for name in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "TRANSFORMERS_CACHE"):
            environment.pop(name, None)
        found.append(run_python(HASH, model, env=environment).stdout.strip())
    assert len(found[0]) == 32
    assert (found[0] == found[2], found[0] != found[1]) == (True, True)


def test_a_cache_of_before_is_already_complete(config: HarvestConfig) -> None:
    harvest_activations(replace(config, max_docs=3), quiet=True)
    as_before(config.out_path)
    again = harvest_activations(replace(config, max_docs=3), quiet=True)
    assert again.already_complete
    assert again.not_recorded == "model configuration and hash of the whole text"


def test_a_cache_of_before_is_continued_with_a_warning(
    config: HarvestConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(config)
    as_before(config.out_path)
    result = harvest_activations(config)
    assert result.resumed_rows > 0
    words = "model configuration and hash of the whole text"
    assert f"warning: the cache was begun without a record of the {words}" in capsys.readouterr().err
    assert open_cache(config.out_path).manifest.summary["not_compared"] == words
    whole = replace(config, out=config.out_path.with_name("whole"))
    harvest_activations(whole, quiet=True)
    a, b = open_cache(config.out_path), open_cache(whole.out_path)
    assert "not_compared" not in b.manifest.summary
    assert (a.hook()[:] == b.hook()[:]).all()


def change_middle(path: Path) -> None:
    lines = path.read_text().split("\n")
    lines[5] = lines[5][::-1]
    path.write_text("\n".join(lines))


def test_one_byte_in_the_middle_of_a_large_text_is_another_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    data = bytearray(b"some words\n" * 300_000)
    path.write_bytes(data)
    first = dict(FileSource(TextConfig(str(path))).identity)
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    second = dict(FileSource(TextConfig(str(path))).identity)
    assert {key for key in first if first[key] != second[key]} == {"dataset_full_xxh3"}


def shorten(path: Path) -> None:
    path.write_text("\n".join(path.read_text().split("\n")[:9]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_middle, r"corpus\.txt, record 5: this is not the text whose rows are committed in .* at character"),
        (lambda path: path.write_text("\n" + path.read_text()), r"record 0: .*it is skipped now: empty"),
        (shorten, r"ends after 9 records, but rows of \d+ are committed"),
    ],
)
def test_the_committed_texts_are_compared(config: HarvestConfig, change: Callable[[Path], None], message: str) -> None:
    """Also where the hash of the text is not recorded."""
    n_rows = interrupt(config)
    as_before(config.out_path)
    change(Path(config.text.dataset))
    identity = {"dataset_xxh3": FileSource(config.text).identity["dataset_xxh3"]}
    edit_signed(config.out_path / "manifest.json", lambda manifest: manifest["fingerprint"].update(identity))
    with pytest.raises(HarvestError, match=message):
        harvest_activations(config, quiet=True)
    assert open_cache(config.out_path, allow_incomplete=True).n_rows == n_rows


def test_another_text_on_standard_input_is_refused(config: HarvestConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Path(config.text.dataset)
    config = replace(config, text=TextConfig("-"))

    def given(data: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))

    given(corpus.read_bytes())
    interrupt(config)
    change_middle(corpus)
    given(corpus.read_bytes())
    with pytest.raises(HarvestError, match=r"stdin, record 5: this is not the text whose rows are committed"):
        harvest_activations(config, quiet=True)


def test_a_file_that_changes_while_it_is_read_stops_the_harvest(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n")
    records = FileSource(TextConfig(str(path), documents="line")).records(0)
    next(records)
    with path.open("a") as stream:
        stream.write("three\n")
    with pytest.raises(SourceStoppedError, match=r"a\.txt was changed since the harvest began"):
        list(records)


def test_hashing_a_text_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_files, "_TELL_SECONDS", -1.0)
    (tmp_path / "a.txt").write_bytes(b"the fox\n" * 1000)
    said: list[str] = []
    assert FileSource(TextConfig(str(tmp_path / "a.txt")), said.append).identity["dataset_full_xxh3"]
    assert said == ["hashing the text: 7.8 KiB of 7.8 KiB"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="no bus errors here")
def test_an_arrow_file_that_is_truncated_under_the_harvest_is_told(tmp_path: Path, config: HarvestConfig) -> None:
    import pyarrow

    table = pyarrow.table({"text": [" ".join(texts(1, seed=i, longest=500)) for i in range(3000)]})
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    code = f"""
import os
from sae_granary.harvest.cli import app
from sae_granary.harvest.text import local_files
original = local_files.table_rows
def rows(path, *given):
    for number, row in enumerate(original(path, *given)):
        if number == 150:
            os.truncate(path, 4096)
        yield row
local_files.table_rows = rows
app(["run", "--model", {config.model.model!r}, "--dataset", {str(tmp_path / "a.arrow")!r}, "--layer", "1",
     "--out", {str(tmp_path / "out")!r}, "--device", "cpu", "--quiet"])
"""
    told = run_python(code, code=-signal.SIGBUS).stderr
    assert "error: a file of the text or the model was truncated while it was read" in told
