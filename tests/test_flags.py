"""What people type means what they meant: lists where one number belongs, YAML, settings of another type, the help."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from command_kit import invoke, refused
from conftest import write_cache

from sae_granary import open_cache, train_sweep
from sae_granary.cache.cli import app as cache_app
from sae_granary.common.errors import ConfigError
from sae_granary.common.quantities import parse_count
from sae_granary.common.settings.yaml_file import load_yaml
from sae_granary.harvest.cli import app as harvest_app
from sae_granary.harvest.settings.make import make_config as make_harvest
from sae_granary.train.cli import app as train_app
from sae_granary.train.config.merge import from_sections, make_config, read_yaml, to_yaml
from sae_granary.train.data.run_data import RunData
from sae_granary.train.sweeps.grid import check_grid, expand

SETTINGS = Path(__file__).parent / "data" / "settings"


# -- a list where one value belongs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": "16,32"}, r"k='16,32': expected a whole number .*: sae-train sweep --grid k=16,32$"),
        ({"seed": "1, 2"}, r"seed='1, 2': .* sae-train sweep --grid seed=1,2$"),
        ({"d_sae": "1024,2048"}, r"d_sae='1024,2048': .* --grid d_sae=1024,2048$"),
        ({"init_seed": "0,1"}, r"init_seed='0,1': .* --grid init_seed=0,1$"),
        ({"k": [16, 32]}, r"k=\[16, 32\]: .* --grid k=16,32$"),
        ({"lr": "1e-3,1e-4"}, r"lr='1e-3,1e-4': expected a number or none; .* --grid lr=1e-3,1e-4$"),
        ({"lr_schedule": "linear,cosine"}, r"expected one of constant, linear, cosine; .* --grid lr_schedule=linear,"),
        ({"normalize": "none,mean"}, r"normalize='none,mean': expected one of .*; .* --grid normalize=none,mean$"),
        ({"optimizer": "adam,sgd"}, r"optimizer='adam,sgd': .* --grid optimizer=adam,sgd$"),
        ({"type": "topk,batchtopk"}, r"type='topk,batchtopk': .* --grid type=topk,batchtopk$"),
        ({"k": "20,000"}, r"k='20,000': expected a whole number"),  # two numbers, or one with a thousands separator
    ],
)
def test_several_values_for_one_setting_name_the_sweep(settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config([{"type": "topk", **settings}])


def test_settings_that_are_lists_take_commas() -> None:
    config = make_config([{"type": "matryoshka", "fractions": "0.5,1", "exclude_tokens": "5,6", "hook": "a"}])
    assert (config.options["fractions"], config.exclude_tokens) == ((0.5, 1.0), ("5", "6"))


@pytest.mark.parametrize("flag", ["max_tokens", "max_docs", "rows_per_shard"])
def test_harvest_counts_hold_no_comma(flag) -> None:
    with pytest.raises(ValueError, match=rf"{flag}='20,000': expected a whole number .* \(20000, without commas\?\)"):
        make_harvest({"model": "demo", "layers": 3, flag: "20,000"})
    assert getattr(make_harvest({"model": "demo", "layers": 3, flag: "20_000"}), flag) == parse_count("20k") == 20_000


# -- YAML: the declared type decides, as for flags -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["007", "12:30", "1_000", "0x1F", "on", "no", "1e3", "2024-01-31", "1.10", ".5"])
def test_a_name_in_yaml_stays_as_it_is_written(tmp_path, name) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"type: topk\nname: {name}\n")
    config = make_config([read_yaml(path)])
    assert config.name == name
    assert load_yaml(to_yaml(config))["run"]["name"] == name


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("batch_size: 010", "batch_size", 10),
        ("batch_size: 1_000", "batch_size", 1000),
        ("tokens: 10k", "tokens", 10_000),
        ("tokens: 1e6", "tokens", 1_000_000),
        ("lr: 1e-3", "lr", 1e-3),
        ("wandb: off", "wandb", "off"),
        ("wandb: false", "wandb", "off"),
        ("keep_best: yes", "keep_best", True),
        ("keep_best: on", "keep_best", True),
        ("keep_best: 0", "keep_best", False),
        ("lr: ~", "lr", None),
        ("lr: null", "lr", None),
        ("lr:", "lr", None),
        ("lr: auto", "lr", None),
        ("hook: [1, 007]", "hook", ("1", "007")),
    ],
)
def test_a_value_in_yaml_gets_the_type_of_its_setting(tmp_path, line, key, value) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"type: topk\n{line}\n")
    got = getattr(make_config([read_yaml(path)]), key)
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize("text", ["0x1F", "12:30", "on", "2024-01-31", "16, 32", "[16, 32]"])
def test_a_value_in_yaml_that_is_no_number_is_refused(tmp_path, text) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"type: topk\nk: {text}\n")
    with pytest.raises(ConfigError, match=r"c\.yaml, line 2: k=.*: expected a whole number"):
        make_config([read_yaml(path)])


def test_a_grid_in_yaml_takes_lists_and_commas(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("type: topk\ngrid:\n  k: 5, 10\n  seed: [0, 01]\n  lr: [1e-3]\n")
    settings = read_yaml(path)
    points = expand(check_grid(settings.pop("grid")), settings)
    typed = [make_config([point.settings]) for point in points]
    assert [(c.options["k"], c.init_seed, c.lr) for c in typed] == [(k, s, 1e-3) for k in (5, 10) for s in (0, 1)]


def test_a_saved_config_of_before_opens_as_before() -> None:
    text = (SETTINGS / "saved_run.yaml").read_text()
    before = from_sections(yaml.safe_load(text), "saved_run.yaml")  # the values as PyYAML types them
    config = from_sections(load_yaml(text), "saved_run.yaml")
    assert repr(config) == repr(before)
    assert (config.name, config.wandb, config.eps, config.exclude_tokens) == ("007", "off", 1e-8, ("5", "7"))
    assert config.options["base_options"] == {"auxk_coef": 0.0, "multi_topk": True}


def test_a_file_by_hand_of_before_opens_as_before() -> None:
    config = make_config([read_yaml(SETTINGS / "by_hand.yaml")])
    assert (config.seed, config.init_seed, config.hook) == (3, None, ("layer_1", "layer_2"))
    assert (config.lr, config.weight_decay, config.tokens, config.batch_size) == (3e-4, 0.01, 10_000, 1024)
    assert (config.grad_clip, config.ema_decay, config.keep_special, config.holdout) == (None, None, True, 0.1)
    assert (config.exclude_tokens, config.max_position) == (("5", "[CLS]"), 63)
    assert (config.wandb, config.wandb_project, config.keep_best) == ("off", "granary", True)
    assert config.options["base_options"] == {"auxk_coef": 0.25, "multi_topk": True}
    assert (config.options["k"], config.options["detach_target"]) == (16, False)


def test_options_of_a_base_get_the_types_that_the_base_declares() -> None:
    config = make_config([{"type": "route", "base": "batchtopk", "base_options": "{auxk_coef: 1e-2}"}])
    assert config.options["base_options"] == {"auxk_coef": 0.01}
    with pytest.raises(ConfigError, match=r"auxk_coef='much': expected a number"):
        make_config([{"type": "route", "base_options": {"auxk_coef": "much"}}])


# -- settings of another type --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type_name", "key", "hint"),
    [
        ("jumprelu", "k", "l0_target"),
        ("vanilla", "k", "l1_coef"),
        ("topk", "l0_target", "k"),
        ("topk", "hooks", "hook"),
    ],
)
def test_a_setting_of_another_type_names_what_this_one_has(type_name, key, hint) -> None:
    with pytest.raises(ConfigError, match=rf"unknown setting '{key}' for type {type_name}; here use {hint}\b"):
        make_config([{"type": type_name, key: 8}])
    with pytest.raises(ConfigError, match=rf"unknown setting '{key}' for type {type_name}; here use {hint}\b"):
        expand(check_grid({key: (8, 16)}), {"type": type_name})


# -- --layer and --layers are one flag -----------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--layer", "--layers", "-l"])
def test_layers_are_one_sae_each_or_the_hook_points_of_one(make_cache, tmp_path, monkeypatch, flag) -> None:
    monkeypatch.chdir(tmp_path)
    make_cache(n_docs=20, hooks=("layer_1", "layer_2", "layer_10"))

    def printed(*words: object) -> dict[str, Any]:
        return load_yaml(invoke(train_app, *words).stdout)

    settings = ["--cache", "toy", "--steps", 4, "-b", 64, "--device", "cpu"]
    for layers in (["1,10"], ["1", flag, "10"]):
        each = invoke(train_app, "run", "--type", "topk", "-k", 4, flag, *layers, *settings, "--dry-run").stdout
        assert "2 SAEs in 1 group" in each
        assert "toy_layer_10_topk" in each
    for layers, hooks in ("1,10", ["layer_1", "layer_10"]), ("all", ["layer_1", "layer_2", "layer_10"]):
        one = printed("run", "--type", "crosscoder", "-k", 4, flag, layers, *settings, "--dry-run")
        assert one["run"]["hook"] == hooks
        assert one["run"]["name"] == f"toy_{len(hooks)}hooks_crosscoder_d128_k4_s0"
    one = printed("config", "--type", "topk", flag, "02", *settings)
    assert one["run"]["hook"] == ["layer_2"]
    one = printed("config", "--type", "topk", flag, "2", "--hook", "layer_10", "--layer-stride", 2, *settings)
    assert one["run"]["hook"] == ["layer_10"]
    assert "SAE each" in refused(train_app, "config", "--type", "topk", flag, "1,2", *settings)


def test_layers_on_the_command_line_override_hooks_of_a_file(make_cache, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_cache(n_docs=20, hooks=("layer_1", "layer_2", "layer_3"))
    Path("c.yaml").write_text("cache: toy\ntype: topk\nk: 4\nhook: layer_1\nsteps: 4\nbatch_size: 64\n")
    out = invoke(train_app, "run", "--config", "c.yaml", "--layer", "2,3", "--dry-run").stdout
    assert "toy_layer_2_topk" in out
    assert "toy_layer_1_topk" not in out


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("layers: 1,10", ["--layers", "1,10"]),
        ("layers: [1, 10]", ["--layers", "1,10"]),
        ("model: {layer: all, layer-stride: 2}", ["--layers", "all", "--layer-stride", "2"]),
        ("hook: layer_2\nlayers: 10", ["--hook", "layer_2", "--layers", "10"]),
    ],
)
def test_layers_in_a_file_are_the_flag(make_cache, tmp_path, monkeypatch, text, flags) -> None:
    monkeypatch.chdir(tmp_path)
    make_cache(n_docs=20, hooks=("layer_1", "layer_2", "layer_10"))
    Path("c.yaml").write_text(f"{text}\n")
    for command in (["run", "--type", "topk"], ["run", "--type", "crosscoder"], ["sweep", "--grid", "type=topk,gated"]):
        common = ["--cache", "toy", "--steps", 4, "-b", 64, "--device", "cpu", "--dry-run"]
        both = [invoke(train_app, *command, *common, *given).stdout for given in (["--config", "c.yaml"], flags)]
        assert both[0].replace("# c.yaml", "# flag") == both[1]
    flags = ["--config", "c.yaml", "--layers", "2,10"]
    assert "toy_layer_2_topk" in invoke(train_app, "run", "--type", "topk", *common, *flags).stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "2,"], "--layers '2,': a name is empty; expected 6, or 2,4,6, or all"),
        (["--hook", ""], "--hook '': a name is empty; expected a hook point of the cache"),
        (
            ["--layers", "all", "--type", "transcoder"],
            "type transcoder reads 2 hook points, got 3: layer_1, layer_2, layer_3; name 2 with --hook",
        ),
        (
            ["--set", "hook=layer_1,layer_2"],
            "got 2: layer_1, layer_2; name one with --hook, or train an SAE of each: sae-train sweep --grid hook=",
        ),
    ],
)
def test_hook_points_that_do_not_fit_name_the_remedy(make_cache, flags, message) -> None:
    cache = make_cache(n_docs=20, hooks=("layer_1", "layer_2", "layer_3"))
    assert message in refused(train_app, "run", "--cache", cache, "--type", "topk", "-b", 64, "--dry-run", *flags)


# -- suggestions lead somewhere ------------------------------------------------------------------------------------


def test_no_section_is_suggested_for_a_flag() -> None:
    for key in ("run", "traning"):  # of --set, which knows no sections
        with pytest.raises(ConfigError, match=rf"unknown setting '{key}' for type topk \(its options"):
            make_config([{"type": "topk", key: "5"}])


def test_all_layers_are_not_a_value_of_a_grid() -> None:
    assert check_grid({"layers": (1, 2)}) == {"hook": ("layer_1", "layer_2")}
    with pytest.raises(ConfigError, match=r"the grid holds layers=all, .*: give --layers all"):
        check_grid({"layers": "all"})


# -- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("app", "command"),
    [
        *((train_app, name) for name in ("run", "sweep", "quick", "config")),
        *((harvest_app, name) for name in ("run", "plan")),
    ],
)
def test_help_shows_the_flags_people_use_and_help_all_the_rest(monkeypatch, app, command) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    group = typer.main.get_command(app)
    every = {name for p in group.commands[command].params for name in p.opts if name.startswith("--")}
    short, full = (invoke(app, command, flag).stdout for flag in ("--help", "--help-all"))
    shown, all_shown = (set(re.findall(r"--[a-z][a-z0-9-]*", text)) & every for text in (short, full))
    assert all_shown == every
    assert 15 <= len(shown) <= 28 < len(every)
    assert {"--layer", "--device", "--debug", "--help-all"} <= shown
    assert shown.isdisjoint({"--grad-acc-steps", "--rows-per-shard", "--layer-stride"})


# -- the wrong kind of folder --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A cache of tokens and a sweep of two runs on it."""
    folder = tmp_path_factory.mktemp("place")
    write_cache(folder / "toy", n_docs=20)
    settings = {"type": "topk", "d_sae": 32, "steps": 2, "batch_size": 64, "device": "cpu", "eval_rows": 64}
    train_sweep({"k": [2, 4]}, settings, cache=str(folder / "toy"), runs_dir=str(folder / "runs"), name="s")
    return folder


def test_a_sweep_where_a_run_belongs_says_what_to_do(place, monkeypatch) -> None:
    monkeypatch.chdir(place)
    names = r"is a sweep of several runs: name one of the folders in it \(toy_layer_3_topk_d32_k2_s0, .*k4_s0\)"
    assert re.search(names, refused(train_app, "export", "runs/s"))
    assert re.search(names, refused(train_app, "push", "runs/s", "me/sae"))
    run = [train_app, "run", "--cache", "toy", "--type", "topk", "-k", 2, "--d-sae", 32, "--steps", 2, "-b", 64, "-q"]
    assert re.search(names, refused(*run, "--init-from", "runs/s"))
    for more in ([], ["--resume", "auto"], ["--overwrite"]):
        text = refused(*run, "--name", "s", *more)
        assert "runs/s is a sweep: continue it with sae-train resume runs/s, or choose another --name" in text
    assert (place / "runs/s/sweep.json").is_file()


def test_verify_takes_several_caches(place, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        shutil.copytree(place / "toy", name)
    assert invoke(cache_app, "verify", "a", "b").stdout.count(": ok (") == 2
    shard = max((path for path in Path("b").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-1])
    result = invoke(cache_app, "verify", "b", "a", code=1)
    assert "a: ok (" in result.output
    assert re.search(r"b: \d problem", result.output)
    assert json.loads(invoke(cache_app, "verify", "a", "b", "--json", code=1).stdout).keys() == {"a", "b"}
    assert "nowhere does not exist" in refused(cache_app, "verify", "a", "nowhere")


def test_a_type_that_reads_neighbors_says_why_texts_have_none(place) -> None:
    opened = open_cache(place / "toy")
    opened.unit = "text"
    config = make_config([{"type": "temporal", "cache": "toy", "batch_size": 64}])
    with pytest.raises(ConfigError, match=r"type temporal ties each token to the one before it, but .*toy holds one"):
        RunData.open(config, opened)
