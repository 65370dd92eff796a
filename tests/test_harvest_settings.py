"""One declaration per setting of a harvest: flags, keywords, YAML, --set and the page come from it."""

import re
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import command_kit
import pytest
import typer
from fresh_package import fresh_package
from harvest_kit import build_model, texts

from sae_granary.common.settings.yaml_file import load_yaml
from sae_granary.harvest.cli import app
from sae_granary.harvest.settings.make import DECLARED, SECTIONS, make_config, read_file
from sae_granary.harvest.text import local_files

REPO = Path(__file__).parents[1]
EXAMPLE = REPO / "examples" / "harvest.yaml"
Invoke = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "bert", "bert")


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> Invoke:
    """Run a command beside `bert/` and `corpus.txt`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local_files, "_TELL_SECONDS", 1000.0)  # a busy machine adds no lines
    (tmp_path / "bert").symlink_to(model)
    (tmp_path / "corpus.txt").write_text("\n".join(texts(20)))

    def run(*args: object, code: int = 0) -> str:
        return command_kit.invoke(app, *args).output if code == 0 else command_kit.refused(app, *args)

    return run


FILE = "model:\n  model: bert\n  device: cpu\nwhere:\n  layers: [1, 2]\ntext: {dataset: corpus.txt, documents: line}\n"
FLAGS = ["--model", "bert", "--device", "cpu", "--layers", "1,2", "--dataset", "corpus.txt", "--documents", "line"]


def test_a_file_in_sections_or_flat_is_the_flags(invoke: Invoke, tmp_path: Path) -> None:
    flat = "model: bert\ndevice: cpu\nlayers: 1,2\ndataset: corpus.txt\ndocuments: line\n"
    plans = [invoke("plan", *FLAGS)]
    for text in (FILE, flat):
        Path("h.yaml").write_text(text)
        plans.append(invoke("plan", "--config", "h.yaml"))
    without_time = [re.sub(r"\n.*(time|free space).*", "", plan) for plan in plans]
    assert without_time[0] == without_time[1] == without_time[2]


def test_flags_and_set_override_the_file(invoke: Invoke) -> None:
    Path("h.yaml").write_text(FILE)
    shown = invoke("config", "--config", "h.yaml", "--layer", 0, "--set", "ctx-len=16", "--set", "pack=no")
    got = {key: value for section in load_yaml(shown).values() for key, value in section.items()}
    assert (got["layers"], got["ctx_len"], got["pack"], got["dataset"]) == (["0"], "16", "false", "corpus.txt")


def test_config_prints_every_setting_with_where_it_comes_from(invoke: Invoke) -> None:
    Path("h.yaml").write_text(FILE)
    text = invoke("config", "--config", "h.yaml", "--max-tokens", "1k")
    shown = load_yaml(text)
    assert tuple(shown) == SECTIONS
    assert [key for section in shown.values() for key in section] == list(DECLARED)
    for line in (
        "  model: bert  # h.yaml",
        "  layers: [1, 2]  # h.yaml",
        "  max_tokens: 1000  # flag",
        "  layer_stride: 1  # default",
        "  ctx_len: 128  # derived",
        "  out: cache/bert_l1-2  # derived",
        "  compute_dtype: float32  # derived",
        "  revision: null  # default",
    ):
        assert f"{line}\n" in text
    assert sorted(path.name for path in Path().iterdir()) == ["bert", "corpus.txt", "h.yaml"]


def test_what_config_prints_is_the_same_harvest(invoke: Invoke) -> None:
    invoke("run", *FLAGS, "--quiet")
    Path("resolved.yaml").write_text(invoke("config", *FLAGS))
    assert "already complete, nothing to do" in invoke("run", "--config", "resolved.yaml", "--quiet")


def test_config_without_a_model_prints_the_defaults(invoke: Invoke) -> None:
    text = invoke("config", "--layers", "all", "--max-tokens", "5M")
    assert text.startswith("# no model was named")
    assert "  layers: all  # flag\n" in text
    assert "  out: null  # default\n" in text
    assert "no model was given" in invoke("run", "--layer", 1, code=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: bert\nlayer: 1\n", "h.yaml, line 2: unknown setting 'layer', did you mean 'layers'?"),
        ("text:\n  datset: a\n", "h.yaml, line 2: unknown setting 'datset', did you mean 'dataset'?"),
        ("contxts:\n  pack: true\n", "h.yaml, line 1: unknown section 'contxts', did you mean 'contexts'?"),
        ("layers: 1\nunit: token\nlayers: 2\n", "h.yaml: 'layers' is set twice, in lines 1 and 3"),
        ("layers: 1\nwhere:\n  layers: 2\n", "h.yaml, line 3: 'layers' is set twice, first in line 1"),
        (
            "model: {model: bert}\ntext:\n  pack: true\n",
            "h.yaml, line 3: 'pack' is in the section text, but belongs in the section contexts",
        ),
        ("output: 5\n", "h.yaml, line 1: output is a section, which holds settings"),
        ("model: bert\noutput:\n  max_tokens: lots\n", "h.yaml, line 3: max_tokens='lots': expected a whole number"),
        ("model: bert\nlayers: 1\nout: {a: 1}\n", "h.yaml, line 3: out={'a': '1'}: expected text"),
        ("model: bert\nlayers: 1\nout: [a]\n", "h.yaml, line 3: out=['a']: expected text"),
        (f"model: bert\nlayers: {'9' * 5000}\n", "h.yaml, line 2: layers='9999"),
        ("model: bert\nctx_len: 1\nlayers: 1\n", "h.yaml, line 2: ctx_len=1: expected a value >= 2"),
        ("model: bert\nlayers: six\n", "h.yaml, line 2: layers='six': expected block numbers from 0"),
        ("model: bert\nlayers: 1\ndtype: float23\n", "h.yaml, line 3: dtype='float23': expected one of auto, float32"),
    ],
)
def test_a_bad_key_or_value_names_file_line_and_the_nearest(invoke: Invoke, text: str, message: str) -> None:
    Path("h.yaml").write_text(text)
    before = sorted(Path().iterdir())
    for command in ("run", "plan", "config"):
        assert message in invoke(command, "--config", "h.yaml", code=2)
    assert sorted(Path().iterdir()) == before


def test_keywords_take_any_sequence() -> None:
    made = make_config({"model": "demo", "layers": range(2, 5), "text_columns": iter(("a", "b")), "hooks": "h.0,h.1"})
    assert (made.where.layers, made.text.text_columns, made.where.hooks) == ((2, 3, 4), ("a", "b"), ("h.0,h.1",))


def test_set_names_what_is_unknown(invoke: Invoke) -> None:
    assert "unknown setting 'ctxlen' of a harvest, did you mean 'ctx_len'?" in invoke(
        "plan", *FLAGS, "--set", "ctxlen=3", code=2
    )
    assert "--set 'ctx_len': expected key=value" in invoke("plan", *FLAGS, "--set", "ctx_len", code=2)


def test_the_example_is_a_harvest() -> None:
    config = make_config(read_file(EXAMPLE))
    assert (config.model.model, config.where.layers, config.tokens.ctx_len) == ("demo", (2, 4), 128)
    assert (config.max_tokens, str(config.out)) == (20_000, "cache/demo_l2-4")


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command_kit.invoke(app, "run", "--config", EXAMPLE, "--max-tokens", "2k", "--device", "cpu", "-q")
    assert (tmp_path / "cache" / "demo_l2-4" / "manifest.json").is_file()


# -- one declaration -----------------------------------------------------------------------------------------------


def test_a_setting_is_added_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with fresh_package():
        from sae_granary.common.settings.declare import setting
        from sae_granary.models import config

        @dataclass(frozen=True)
        class TokenConfig(config.TokenConfig):
            overlap: int = setting(0, section="contexts", help="Tokens that contexts share.", unit="tokens", ge=0)

        config.TokenConfig = TokenConfig
        from sae_granary.harvest.cli import app
        from sae_granary.harvest.settings.make import make_config, read_file

        help_all = command_kit.invoke(app, "run", "--help-all", env=command_kit.WIDE).output
        assert re.search(r"--overlap .*Tokens that contexts share\. \(default: 0 tokens\)", help_all)
        assert "  overlap: 3  # flag\n" in command_kit.invoke(app, "config", "--overlap", 3).output
        Path("h.yaml").write_text("model: demo\nlayers: 1\ncontexts: {overlap: 4}")
        assert make_config(read_file("h.yaml")).tokens.overlap == 4
        assert make_config({"model": "demo", "layers": 1, "overlap": "1k"}).tokens.overlap == 1000
        page = runpy.run_path(str(REPO / "docs" / "generate.py"))["page"]()
    assert "| `overlap` | `--overlap` | whole number of tokens | 0 | ≥ 0 | Tokens that contexts share. |" in page


def test_every_setting_has_help_and_its_own_flag() -> None:
    command = typer.main.get_command(app).commands["run"]
    flags = {parameter.name: parameter for parameter in command.params}
    assert set(DECLARED) <= set(flags)
    long = [name for name in DECLARED for name in flags[name].opts if name.startswith("--")]
    assert len(long) == len(set(long))
    for name, spec in DECLARED.items():
        assert re.fullmatch(r"[A-Za-z].*\.", spec.metadata["help"]), name
        assert spec.metadata["section"] in SECTIONS
