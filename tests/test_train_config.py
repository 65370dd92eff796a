"""Settings: types, precedence, unknown keys, sections, derived values."""

from dataclasses import replace
from pathlib import Path

import pytest

from sae_granary import open_cache, train_sae
from sae_granary.common.errors import ConfigError
from sae_granary.common.settings.build import parse_assignments
from sae_granary.common.settings.coerce import coerce
from sae_granary.train.config.merge import (
    TRAINER_KEYS,
    from_sections,
    make_config,
    read_yaml,
    to_sections,
    to_yaml,
)
from sae_granary.train.config.resolve import MAX_EPOCHS, default_name, n_steps_of
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.data.run_data import RunData
from sae_granary.train.sweeps.sweep import plan_sweep


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("10k", int, 10_000),
        ("1.5M", int, 1_500_000),
        ("2B", int, 2_000_000_000),
        ("1e6", int, 1_000_000),
        ("1_000", int, 1000),
        (5.0, int, 5),
        ("3e-4", float, 3e-4),
        (1, float, 1.0),
        ("yes", bool, True),
        ("off", bool, False),
        ("none", int | None, None),
        ("auto", float | None, None),
        ("7", int | None, 7),
        ("0.1, 0.5,1", tuple[float, ...], (0.1, 0.5, 1.0)),
        ([1, 2], tuple[int, ...] | None, (1, 2)),
        ("[CLS],[SEP]", tuple[str, ...], ("[CLS]", "[SEP]")),
        ("[1, 2]", tuple[int, ...], (1, 2)),
        ("{k: 64}", dict[str, object], {"k": "64"}),
    ],
)
def test_values_become_typed(value, annotation, expected) -> None:
    got = coerce("key", value, annotation)
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        ("abc", int, r"steps='abc': expected a whole number"),
        ("1.5", int, r"expected a whole number"),
        (True, int, r"steps=True: expected a whole number"),
        ("maybe", bool, r"expected true or false"),
        ([1], str, r"expected text"),
        (float("inf"), int, r"expected a whole number"),
        ("k: [", dict[str, object], r"expected a mapping"),
    ],
)
def test_values_that_do_not_fit_are_refused(value, annotation, message) -> None:
    with pytest.raises(ConfigError, match=message):
        coerce("steps", value, annotation)


def test_flags_win_over_yaml_over_recommended_over_defaults(tmp_path, monkeypatch) -> None:
    from sae_granary import sae_core

    monkeypatch.setattr(sae_core.registry.get("topk"), "recommended", {"lr": 0.1, "k": 5, "beta1": 0.5})
    path = tmp_path / "c.yaml"
    path.write_text("type: topk\nmodel:\n  k: 7\ntraining:\n  lr: 0.2\n  batch-size: 32\ndata:\n  holdout: 0.1\n")
    config = make_config([read_yaml(path), {"lr": "0.3"}])
    assert (config.lr, config.options["k"], config.beta1) == (0.3, 7, 0.5)
    assert (config.batch_size, config.holdout, config.optimizer) == (32, 0.1, "adam")


def test_a_length_on_top_replaces_the_one_below() -> None:
    config = make_config([{"type": "topk", "epochs": 3, "d_sae": 64}, {"steps": "100", "expansion_factor": "4"}])
    assert (config.steps, config.epochs, config.expansion_factor) == (100, None, 4.0)
    assert "d_sae" not in config.options


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"no type of SAE was given; choose one with --type: .*topk"),
        ({"type": "topk", "leraning_rate": 1}, r"unknown setting 'leraning_rate' for type topk"),
        ({"type": "topk", "auxk_coeff": 1}, r"did you mean 'auxk_coef'\?"),
        (
            {"type": "topk", "optimizer": "adamm"},
            r"optimizer='adamm': expected one of adam, .*, did you mean 'adam'",
        ),
        ({"type": "topk", "lr": -1}, r"lr=-1.0: expected a value > 0"),
        ({"type": "topk", "holdout": 0.95}, r"holdout=0.95: expected a value <= 0.9"),
        ({"type": "topk", "steps": 3, "epochs": 1}, r"one length, got steps=3, epochs=1.0"),
        ({"type": "topk", "d_sae": 3, "expansion_factor": 1}, r"d_sae=3 and expansion_factor=1.0: give one"),
        (
            {"type": "topk", "batch_size": 10, "grad_acc_steps": 3},
            r"batch_size=10 does not split into grad_acc",
        ),
    ],
)
def test_settings_that_cannot_be(settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config([settings])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"is not plain YAML: line 1: "),
        ("- 1", r"expected keys and values, got list"),
        ("type: !!python/object/apply:os.system ['touch canary']", r"is not plain YAML"),
    ],
)
def test_bad_yaml(tmp_path, monkeypatch, text, message) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        make_config([read_yaml("c.yaml")])
    assert not (tmp_path / "canary").exists()


def test_missing_yaml_and_bad_assignments() -> None:
    with pytest.raises(ConfigError, match=r"config file nowhere.yaml: No such file"):
        read_yaml("nowhere.yaml")
    with pytest.raises(ConfigError, match=r"--set 'k': expected key=value"):
        parse_assignments(["k"])
    assert parse_assignments(["k=3", "lr-final = 0.1"]) == {"k": "3", "lr_final": "0.1"}


def test_resolving_decides_everything_and_survives_yaml(make_cache, tmp_path) -> None:
    path = make_cache()
    data = RunData.open(make_config([{"type": "batchtopk", "cache": str(path), "batch_size": 256, "k": 4}]))
    config = data.config
    assert config.options["d_in"], config.options["d_sae"] == (16, 128)
    assert config.steps == MAX_EPOCHS * data.counts.train // 256  # under 1000 steps: 16 passes
    assert config.warmup_steps == config.steps // 20
    assert config.options["dead_after_tokens"] == 20 * 256
    assert config.name == "toy_layer_3_batchtopk_d128_k4_s0"
    assert (config.device, config.shuffle_seed, config.init_seed, config.keep_first_position) == ("cpu", 0, 0, True)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    import yaml

    assert from_sections(yaml.safe_load((tmp_path / "c.yaml").read_text()), "c.yaml") == config


def test_every_setting_is_in_the_saved_config() -> None:
    sections = to_sections(TrainConfig(cache="c", type="topk"))
    assert sorted(key for section in sections.values() for key in section) == sorted(TRAINER_KEYS)


def test_run_length() -> None:
    base = TrainConfig(batch_size=100)
    assert n_steps_of(replace(base, steps=7), 1000) == 7
    assert n_steps_of(replace(base, tokens=2550), 1000) == 25
    assert n_steps_of(replace(base, epochs=2.5), 1000) == 25
    assert n_steps_of(base, 1000) == 160  # 16 passes
    assert n_steps_of(base, 50_000) == 1000  # 2 passes
    assert n_steps_of(base, 10**6) == 10_000  # 1 pass


def test_names_tell_seeds_apart() -> None:
    config = TrainConfig(
        cache="data/bert_l6", type="topk", hook=("layer_6",), shuffle_seed=0, init_seed=0, options={"d_sae": 8, "k": 2}
    )
    assert default_name(config) == "bert_l6_layer_6_topk_d8_k2_s0"
    assert default_name(replace(config, init_seed=3)) == "bert_l6_layer_6_topk_d8_k2_s3-o0"
    assert default_name(replace(config, hook=("a", "b"))) == "bert_l6_2hooks_topk_d8_k2_s0"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 10_000}, r"batch_size=10,000 is larger than the [\d,]+ rows to train on \([\d,]+ in the cache"),
        ({"batch_size": 64, "k": 500}, r"k=500: expected k <= d_sae=128"),
        ({"batch_size": 64, "steps": 5, "warmup_steps": 5}, r"warmup_steps=5 is not shorter than the run of 5 steps"),
        (
            {"batch_size": 64, "hook": "layer_9"},
            r"no hook point 'layer_9' \(it has: layer_3\), did you mean 'layer_3'\?",
        ),
        ({"batch_size": 64, "min_norm": 1e9}, r"batch_size=64 is larger than the 0 rows to train on"),
    ],
)
def test_what_the_cache_cannot_serve(make_cache, settings, message) -> None:
    from sae_granary import sae_core

    with pytest.raises((ConfigError, sae_core.SAEError), match=message):
        RunData.open(make_config([{"type": "topk", "cache": str(make_cache()), **settings}]))


def test_several_hook_points_need_a_choice(make_cache) -> None:
    path = str(make_cache(hooks=("layer_1", "layer_2")))
    with pytest.raises(ConfigError, match=r"2 hook points, choose one with --hook: layer_1, layer_2"):
        RunData.open(make_config([{"type": "topk", "cache": path, "batch_size": 64}]))
    config = RunData.open(make_config([{"type": "route", "cache": path, "batch_size": 64}])).config
    assert config.hook == ("layer_1", "layer_2")
    assert config.options["n_hooks"] == 2


def test_text_rows_keep_position_0(make_cache) -> None:
    opened = open_cache(make_cache(decoder=True))
    from sae_granary.cache.load.selection import Filters

    assert Filters().resolve(opened).first_position is False
    opened.unit = "text"
    assert Filters().resolve(opened).first_position is True


EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.yaml"))
SWEEP = next(path for path in EXAMPLES if path.stem == "sweep")
EXAMPLES = [path for path in EXAMPLES if path.stem not in ("sweep", "finetune_kl", "harvest")]  # others test these


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_train(make_cache, tmp_path, path) -> None:
    settings = read_yaml(path)
    assert settings["type"] == path.stem
    toy = make_cache(n_docs=30, hooks=tuple(settings.get("hook", ["layer_6"])))
    short = {"cache": str(toy), "epochs": None, "steps": 3, "batch_size": 64, "eval_rows": 64}
    short |= {"k": 4} if "k" in settings else {}
    result = train_sae(make_config([{**settings, **short, "runs_dir": str(tmp_path / "runs")}]))
    assert result.summary["type"] == path.stem
    assert 0 < result.summary["eval"]["l0"] <= 128


def test_every_common_type_has_an_example() -> None:
    assert {"vanilla", "gated", "topk", "batchtopk", "jumprelu", "matryoshka"} <= {p.stem for p in EXAMPLES}


def test_the_example_of_a_sweep_is_planned(make_cache) -> None:
    settings = read_yaml(SWEEP) | {"cache": str(make_cache()), "batch_size": 128, "d_sae": 80}
    settings.pop("expansion_factor")
    plan = plan_sweep(settings.pop("grid"), settings)
    assert len(plan.entries) == 12
    assert len(plan.groups) == 1
