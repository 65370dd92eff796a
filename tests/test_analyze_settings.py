"""One declaration per option of `sae-analyze`: flags, the YAML file of all commands, rows of the page."""

import re
from pathlib import Path

import pytest
import typer
from command_kit import refused

from sae_granary.analyze.cli import app
from sae_granary.analyze.commands.options import read_options
from sae_granary.analyze.encoding.outputs import SUFFIXES
from sae_granary.analyze.settings import COMMANDS, Encode, Eval, Search, Show, Stats
from sae_granary.common.errors import ConfigError
from sae_granary.common.settings.declare import declared

FILE = """\
cache: cache/a
device: cpu
model: demo
encode:
  pool: max
  format: npz
  device: cuda
show:
  latent: 3, 5
  text: a, b
search: {pool: mean, top: 1k}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "analyze.yaml"
    path.write_text(FILE)
    return path


def test_a_file_holds_options_of_all_commands_and_of_each(file: Path) -> None:
    encode = read_options(Encode, file, {"pool": None, "format": "parquet"})  # flags override it
    assert (encode.cache, encode.device, encode.model) == (str(Path("cache/a")), "cuda", "demo")
    assert (encode.pool, encode.format, encode.text) == ("max", "parquet", ())
    show = read_options(Show, file, {})
    assert (show.device, show.latent, show.text, show.top) == ("cpu", (3, 5), ("a, b",), 5)
    assert read_options(Search, file, {"top": "7"}) == Search(
        cache=str(Path("cache/a")), device="cpu", pool="mean", top=7
    )
    assert read_options(Stats, file, {}).model == "demo"
    assert read_options(Eval, None, {}) == Eval()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cahce: a\n", "line 1: unknown setting 'cahce', did you mean 'cache'?"),
        ("device: cpu\nencod:\n  pool: max\n", "line 2: unknown section 'encod', did you mean 'encode'?"),
        ("encode:\n  pol: max\n", "line 2: unknown setting 'pol', did you mean 'pool'?"),
        ("stats:\n  part: train\n", "line 2: 'part' is in the section stats, but belongs in the section eval"),
        ("eval:\n  pool: max\n", "line 2: 'pool' is in the section eval, but belongs in the section encode or search"),
        ("hook: a\ndevice: cpu\nhook: b\n", "'hook' is set twice, in lines 1 and 3"),
        ("encode: 5\n", "line 1: encode is a section, which holds settings"),
        ("stats:\n  device: cpu\n  logits: much\n", "line 3: logits='much': expected true or false"),
        ("stats: {logits: true}\ndevice: [cpu]\n", "line 2: device=['cpu']: expected text"),
    ],
)
def test_a_bad_key_or_value_names_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    error = refused(app, "stats", tmp_path / "run", "--config", path)
    assert error.startswith(f"error: {path}")
    assert message in error
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flags_are_the_declared_options(command: str) -> None:
    parameters = {parameter.name: parameter for parameter in typer.main.get_command(app).commands[command].params}
    for name, spec in declared(COMMANDS[command]).items():
        assert parameters[name].opts[0] == f"--{name.replace('_', '-')}"
        assert re.fullmatch(r"[A-Za-z].*\.", spec.metadata["help"]), name


def test_formats_are_those_of_the_code() -> None:
    assert declared(Encode)["format"].metadata["choices"] == tuple(SUFFIXES)


def test_a_wrong_option_in_python_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^part='test': expected one of heldout, train, all$"):
        Eval(part="test")
