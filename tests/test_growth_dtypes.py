# ruff: noqa: F811
"""Caches of int8 and of one row per text are extended, added to and repaired as others are."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from cache_kit import contents, flip
from test_harvest_extend import config, harvest, models  # noqa: F401
from test_harvest_resume import write_corpus

from sae_granary import open_cache
from sae_granary.cache.convert import convert
from sae_granary.cache.read.verify import verify
from sae_granary.common.errors import ConfigError
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.errors import HarvestError
from sae_granary.harvest.replay.add import add_hooks
from sae_granary.harvest.replay.repair import repair
from sae_granary.models.config import ModelConfig, TokenConfig, WhereConfig

LAYER_2 = WhereConfig(layers=(2,))


def damage_all(path: Path, how: str) -> int:
    """Every file but the manifests; how many."""
    names = [name for name in contents(path) if not name.endswith("manifest.json")]
    for name in names:
        file = path / name
        if how == "flipped":
            flip(file, file.stat().st_size // 2)
        elif how == "missing":
            file.unlink()
        else:
            os.truncate(file, file.stat().st_size // 2)
    return len(names)


def assert_repaired(path: Path, how: str) -> None:
    before = contents(path)
    n = damage_all(path, how)
    assert sum(len(damage.files) for damage in repair(path, quiet=True)) == n
    assert contents(path) == before


def assert_added(path: Path, whole: Path) -> None:
    """Activations, norms, scales, steps and offsets of the added layer are those of a harvest that had it."""
    added, want = contents(path / "added/layer_2"), contents(whole)
    names = [name for name in want if "/layer_2/" in name]
    assert {name.split("/")[0] for name in names} == {"activations", "norms", "scales", "affine"}
    assert [name for name in names if added.get(name) != want[name]] == []


def test_hook_points_are_added_to_int8_and_repaired(config: HarvestConfig) -> None:
    config = replace(config, dtype="int8", max_tokens=300)
    both = replace(config, where=WhereConfig(layers=(1, 2)), out=config.out_path.with_name("both"))
    harvest(config)
    harvest(both)
    add_hooks(config.out_path, LAYER_2, quiet=True)
    assert_added(config.out_path, both.out_path)
    assert_repaired(config.out_path, "flipped")


@pytest.mark.slow
def test_int8_is_extended_and_the_addition_continued(config: HarvestConfig) -> None:
    config = replace(config, dtype="int8")
    both = replace(config, where=WhereConfig(layers=(1, 2)), out=config.out_path.with_name("both"))
    for one in (config, both):
        harvest(one)
    before = contents(config.out_path)
    add_hooks(config.out_path, LAYER_2, quiet=True)
    for one in (config, both):
        harvest(one, extend=True, max_tokens=1500)
    after = contents(config.out_path)
    assert [name for name in before if before[name] != after[name] and "json" not in Path(name).name] == []
    add_hooks(config.out_path, LAYER_2, quiet=True)
    assert_added(config.out_path, both.out_path)
    cache = open_cache(config.out_path)
    assert cache.stats("layer_2").n_rows == cache.stats("layer_1").n_rows == cache.n_rows >= 1500
    assert verify(config.out_path).ok
    for how in ("missing", "truncated"):
        assert_repaired(config.out_path, how)


@pytest.mark.slow
def test_a_converted_cache_is_refused_by_its_name(config: HarvestConfig) -> None:
    harvest(config, dtype="float16")
    made = convert(config.out_path, config.out_path.with_name("made"), "int8").path
    before = contents(made)
    words = "was converted from a cache of float16"
    with pytest.raises(HarvestError, match=words):
        add_hooks(made, LAYER_2, quiet=True)
    assert contents(made) == before
    flip(made / "activations/layer_1/c.1.0")
    with pytest.raises(HarvestError, match=words):
        repair(made, quiet=True)


def pooled(config: HarvestConfig, model: str, dtype: str) -> HarvestConfig:
    """Harvested and extended: one row per text."""
    corpus = write_corpus(config.out_path.with_name("texts.txt"), 700)
    config = replace(
        config, model=ModelConfig(model, device="cpu"), where=WhereConfig(unit="text"), tokens=TokenConfig(),
        text=replace(config.text, dataset=str(corpus)), dtype=dtype, max_tokens=300, rows_per_shard=128,
    )  # fmt: skip
    harvest(config)
    harvest(config, extend=True, max_tokens=400)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flipped", "missing", "truncated"])
@pytest.mark.parametrize(("model", "dtype"), [("bert", "float32"), ("bert", "int8"), ("demo", "auto")])
def test_pooled_rows_are_repaired_after_any_damage(
    config: HarvestConfig, models: dict[str, str], model: str, dtype: str, how: str
) -> None:
    config = pooled(config, models.get(model, model), dtype)
    assert len(open_cache(config.out_path).records) == 4
    with pytest.raises(ConfigError, match="one row per text: layers are added to caches of one row per token only"):
        add_hooks(config.out_path, LAYER_2, quiet=True)
    assert_repaired(config.out_path, how)
    path = config.out_path / "activations" / next(iter(open_cache(config.out_path).hook_points)) / "c.1.0"
    data = path.read_bytes()
    path.unlink()
    repair(config.out_path, quiet=True)
    assert path.read_bytes() == data
