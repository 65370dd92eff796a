"""One declaration per setting: what is added in one place is a flag, a YAML key, a keyword and a row of the page."""

import importlib.util
import os
import runpy
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from command_kit import invoke, refused
from fresh_package import fresh_package
from typer.testing import CliRunner

from sae_granary import sae_core
from sae_granary.common.errors import ConfigError
from sae_granary.common.settings.declare import check, setting
from sae_granary.common.settings.flags import parameters_of
from sae_granary.common.settings.page import rows_of
from sae_granary.common.settings.yaml_file import TOP, flat_settings, load_yaml
from sae_granary.harvest.settings.flags import given_settings
from sae_granary.train.cli import app
from sae_granary.train.config.merge import read_yaml
from sae_granary.train.config.settings import OPTIMIZERS, TrainConfig
from sae_granary.train.config.type_options import TypeOptions
from sae_granary.train.optim import optimizers

ROOT = Path(__file__).resolve().parents[1]

# -- a setting is added in one place -------------------------------------------------------------------------------


def patched_settings() -> None:
    """The module of training settings with one more field."""
    name = "sae_granary.train.config.settings"
    spec = importlib.util.find_spec(name)
    source = Path(spec.origin).read_text(encoding="utf-8")
    field = "    half_life: int = _training(7, help='Half-life of the momentum.', unit='steps', gt=0)"
    patched = source.replace("    cache: str = ", field + "\n    cache: str = ", 1)
    assert patched != source
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    exec(compile(patched, spec.origin, "exec"), module.__dict__)


def test_a_setting_is_added_in_one_place(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with fresh_package():
        patched_settings()
        from sae_granary import train_sae
        from sae_granary.common.errors import ConfigError
        from sae_granary.train.cli import app

        def run(*args: str) -> str:
            result = CliRunner().invoke(app, [*args], env={"COLUMNS": "200"})
            return " ".join(result.output.split())

        assert "--half-life <str> Half-life of the momentum. (default: 7 steps)" in run("run", "--help-all")
        assert "--half-life" not in run("run", "--help")
        Path("c.yaml").write_text("type: topk\ntraining: {half-life: 8}\n")
        config = ("config", "--config", "c.yaml")
        assert "half_life: 7 # default" in run("config", "--type", "topk")
        assert "half_life: 8 # c.yaml" in run(*config)
        assert "half_life: 9 # flag" in run(*config, "--set", "half_life=9")
        assert "half_life: 10 # flag" in run(*config, "--half-life", "10")
        unknown = "unknown setting 'half_live' for type topk, did you mean 'half_life'?"
        assert unknown in run(*config, "--set", "half_live=9")
        with pytest.raises(ConfigError, match=r"^half_life=0: expected a value > 0$"):
            train_sae(cache="nowhere", type="topk", half_life=0)
        page = runpy.run_path(str(ROOT / "docs" / "generate.py"))["page"]()
    assert "| `half_life` | `--half-life` | whole number of steps | 7 | > 0 | Half-life of the momentum. |" in page


@dataclass(frozen=True)
class Toy:
    share: float = setting(0.5, help="Share of the rows.", section="data", ge=0, lt=1, short="-s", common=True)
    words: tuple[str, ...] = setting((), help="Word to look for. Repeatable.", section="data", repeat=True)
    fast: bool = setting(False, help="Skip the check.", section="run", default_words="off")
    mode: str = setting("a", help="Mode.", section="run", choices=("a", "b"))
    plain: int = 3  # not declared: no flag, no row


def test_a_field_makes_a_flag_and_a_row() -> None:
    flags = {p.name: p.annotation.__metadata__[0] for p in parameters_of(Toy)}
    assert list(flags) == ["share", "words", "fast", "mode"]
    assert [*flags["share"].param_decls, flags["share"].default] == ["-s", "--share"]
    assert flags["share"].help == "Share of the rows. (>= 0, < 1; default: 0.5)"
    assert (flags["share"].hidden, flags["fast"].hidden) == (False, True)
    assert flags["fast"].default == "--fast/--no-fast"
    assert flags["mode"].help == "Mode. (a, b; default: a)"
    assert flags["words"].rich_help_panel == "Data"
    assert rows_of(Toy, "run") == [
        ("`fast`", "`--fast`", "true or false", "off", "", "Skip the check."),
        ("`mode`", "`--mode`", "one of a, b", "a", "", "Mode."),
    ]
    check(Toy())
    with pytest.raises(ConfigError, match=r"share=1.0: expected a value < 1"):
        check(Toy(share=1.0))
    with pytest.raises(ConfigError, match=r"mode='c': expected one of a, b"):
        check(Toy(mode="c"))


def test_every_option_of_a_type_is_a_flag() -> None:
    module = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    text = module["TYPE_OPTIONS"].read_text(encoding="utf-8")
    assert module["type_options"]() == text, "write it with `make regenerate`"
    flags = {field.name for field in fields(TypeOptions)}
    for name in sae_core.registry.names():
        assert {field.name for field in fields(sae_core.registry.get(name).Config)} - set(module["OF_CACHE"]) <= flags
    assert flags.isdisjoint(field.name for field in fields(TrainConfig))


def test_flags_of_options_are_negated_and_nested() -> None:
    printed = invoke(app, "config", "--type", "route", "--no-detach-target", "--base-options", "{k: 3}").stdout
    options = load_yaml(printed)["model"]
    assert (options["detach_target"], options["base_options"]) == ("false", {"k": "3"})


def test_settings_name_the_optimizers_that_there_are() -> None:
    assert tuple(optimizers.OPTIMIZERS) == OPTIMIZERS


# -- files: what is wrong, with file, line and the nearest name ----------------------------------------------------

WRONG = [
    ("training:\n  bach_size: 1", "line 2: unknown setting 'bach_size', did you mean 'batch_size'?"),
    ("bach-size: 1", "line 1: unknown setting 'bach_size', did you mean 'batch_size'?"),
    ("training:\n  lr: 1\n  k: 32", "line 3: 'k' is in the section training, but belongs in the section model"),
    ("logging: {lr: 1}", "line 1: 'lr' is in the section logging, but belongs in the section training"),
    ("run:\n  grid: {k: 1}", "line 2: 'grid' is in the section run, but belongs beside the sections"),
    ("trainning:\n  lr: 1", "line 1: unknown section 'trainning', did you mean 'training'? (sections: run, model,"),
    ("run: 5", "line 1: run is a section, which holds settings, got run: '5'"),
    ("training: [1]", "line 1: training is a section, which holds settings, got training: ['1']"),
    ("model: {k: 3, k: 4}", "c.yaml: 'k' is set twice, in lines 1 and 1; remove one"),
    ("type: topk\nk: 2020-13-45", "line 2: k='2020-13-45': expected a whole number"),
    ("lr: 1\n\nlr: 2", "c.yaml: 'lr' is set twice, in lines 1 and 3; remove one"),
    ("lr: 1\ntraining:\n  lr: 2", "line 3: 'lr' is set twice, first in line 1; remove one"),
    ("training:\n  batch-size: 1\n  batch_size: 2", "line 3: 'batch_size' is set twice, first in line 2; remove one"),
    ("type: topk\ntraining:\n  lr: fast", "line 3: lr='fast': expected a number or none"),
    ("type: topk\nlr: -1", "line 2: lr=-1.0: expected a value > 0"),
    ("lr: 1\ntype: topkk", "line 2: unknown type 'topkk' (known types: abstopk, "),
    ("type: topk\nk: 0", "line 2: k=0: expected a value > 0"),
    ("type: vanilla\nk: 3", "line 2: unknown setting 'k' for type vanilla; here use l1_coef (its options: d_sae"),
    ("type: topk\nl0: 3", "line 2: unknown setting 'l0' for type topk; here use k "),
    ("type: topk\nk: !!bool maybe", "line 2: k='maybe': expected a whole number"),
    ("type: topk\nk: !!int ''", "line 2: k='': expected a whole number"),
    ("type: topk\nlr: !!timestamp foo", "line 2: lr='foo': expected a number or none"),
    ("type: topk\nbatch_size: 1e400", "line 2: batch_size='1e400': expected a whole number"),
    (f"type: topk\nbatch_size: {'9' * 5000}", "line 2: batch_size='9999"),
    (f"type: topk\ncache: x\nlr: {'9' * 5000}", "line 3: lr=inf: expected a finite number"),
    ("lr: 1\n~: 3", "line 2: unknown setting 'None'"),
    ("training:\n  ~: 3", "line 2: unknown setting 'None'"),
    ("grid:\n  k: [1]\n  bach_size: [1]", "line 3: unknown setting 'bach_size', did you mean 'batch_size'?"),
    ("grid:\n  batch-size: [1]\n  batch_size: [2]", "line 3: 'batch_size' is set twice, first in line 2; remove one"),
]


@pytest.mark.parametrize(("text", "message"), WRONG, ids=[message.split(":")[-2][-30:] for _, message in WRONG])
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path, monkeypatch, text, message) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text)
    error = refused(app, "config", "--config", "c.yaml")
    assert error.startswith("error: c.yaml")
    assert message in error


@pytest.mark.parametrize("text", ["[" * 3000 + "]" * 3000, "".join(f"\n{' ' * i}- " for i in range(1, 150))])
def test_deep_lists_are_refused_at_their_line(tmp_path, text) -> None:
    (tmp_path / "c.yaml").write_text(f"lr: 1\nk: {text}\n")
    with pytest.raises(ConfigError, match=r"c\.yaml is not plain YAML: line (2|102): lists and mappings are nested"):
        read_yaml(tmp_path / "c.yaml")


def test_an_assignment_that_is_given_twice_is_refused(make_cache) -> None:
    given = ["--type", "topk", "--set", "batch-size=1", "--set", "batch_size=2"]
    error = refused(app, "run", "--cache", make_cache(), *given)
    assert "error: --set batch_size is given twice, as '1' and '2': give it once" in error
    with pytest.raises(ConfigError, match="--set layers is given twice"):
        given_settings(assignments=["layers=1", "layers=1"])


REPEATED = {
    "a list": "training:\n  lr: [&l0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]{}]\n".format(
        "".join(f", &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 9))
    ),
    "a merge": "model: {{k: [&m0 {{k: 1}}{}]}}\n".format(
        "".join(f", &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}]}}" for i in range(1, 9))
    ),
}


@pytest.mark.parametrize("kind", REPEATED)
def test_aliases_that_make_a_billion_values_are_refused_before_they_do(tmp_path, kind) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(REPEATED[kind])
    with pytest.raises(ConfigError, match=r"its aliases \(\*name\) repeat more than 100,000 values"):
        read_yaml(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_a_pipe_without_a_writer_is_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="a pipe that nothing is written to, expected a file"):
        read_yaml(tmp_path / "c.yaml")
    reader, writer = os.pipe()
    os.write(writer, b"k: 3")
    os.close(writer)
    assert read_yaml(f"/dev/fd/{reader}") == {"k": "3"}
    os.close(reader)


def test_a_file_without_end_is_not_read_to_it() -> None:
    with pytest.raises(ConfigError, match=r"longer than 4\.0 MiB"):
        read_yaml("/dev/zero")


def test_a_layer_of_any_length_is_a_name(tmp_path, make_cache) -> None:
    error = refused(app, "config", "--cache", make_cache(), "--type", "topk", "--layer", "9" * 5000)
    assert "the cache has no hook point 'layer_9999" in error


def test_a_sweep_names_the_line_too(tmp_path, make_cache) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"cache: {make_cache()}\ntype: topk\ngrid: {{k: [1, 2]}}\ntraining:\n  batch_size: many\n")
    error = refused(app, "sweep", "--config", path, "--dry-run")
    assert f"{path}, line 5: batch_size='many': expected a whole number" in error


def test_a_place_follows_its_setting(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("wandb:\n  wandb_project: mine\nmodel:\n  layers: 2,4\ndata: {<<: {holdout: 0.1}}\n")
    settings = read_yaml(path)
    assert settings == {"wandb_project": "mine", "layers": "2,4", "holdout": "0.1"}
    assert settings.located("layers", "no") == f"{path}, line 4: no"
    settings.update({"layers": "6"})  # of the command line
    assert settings.located("layers", "no") == "no"


def test_a_saved_file_may_hold_what_an_older_version_knew() -> None:
    content = load_yaml("run: {lr: 1}\ndata: {gone: 2}\n")
    assert flat_settings(content, "config.yaml", ("run", "data")) == {"lr": "1", "gone": "2"}
    with pytest.raises(ConfigError, match="'lr' is in the section run, but belongs in the section data"):
        flat_settings(content, "config.yaml", ("run", "data"), {"lr": "data", "gone": TOP})
