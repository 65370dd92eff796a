# ruff: noqa: F811
"""Runs and codes of a cache that was extended, or given hook points, since: they continue on the rows that they had."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_harvest_extend import config, harvest, models  # noqa: F401
from test_train_resume import assert_same, interrupted

from sae_granary import open_cache, resume_training, train_sae
from sae_granary.analyze.source import open_source
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.replay.add import add_hooks
from sae_granary.models.config import WhereConfig

SETTINGS = {"type": "topk", "k": 4, "batch_size": 64, "steps": 24, "save_every": 7, "log_every": 1, "d_sae": 64}


def grow(config: HarvestConfig) -> None:
    harvest(config, extend=True, max_tokens=1500)
    add_hooks(config.out_path, WhereConfig(layers=(2,)), quiet=True)


@pytest.fixture
def settings(config: HarvestConfig, tmp_path: Path) -> dict[str, object]:
    harvest(config)
    return {**SETTINGS, "cache": str(config.out_path), "runs_dir": str(tmp_path / "runs")}


@pytest.mark.parametrize("how", ["resume", pytest.param("auto", marks=pytest.mark.slow)])
def test_a_run_resumes_bitwise_after_its_cache_has_grown(
    config: HarvestConfig, settings: dict[str, object], how: str
) -> None:
    whole = train_sae(**settings, name="whole")
    stopped = interrupted(10, **settings, name="stopped")
    grow(config)
    found = resume_training(stopped) if how == "resume" else train_sae(**settings, name="stopped", resume="auto")
    assert_same(found.folder, whole.folder)
    again = train_sae(**settings, name="new")  # reads all rows, and the hook point that was there
    assert again.summary["rows"]["total"] > whole.summary["rows"]["total"]
    assert again.summary["rows"]["total"] == open_cache(config.out_path).n_rows


@pytest.mark.slow
def test_an_added_hook_point_is_trained_on_as_any_other(config: HarvestConfig, settings: dict[str, object]) -> None:
    grow(config)
    both = replace(config, where=WhereConfig(layers=(1, 2)), out=config.out_path.with_name("both"))
    harvest(both)
    harvest(both, extend=True, max_tokens=1500)
    options = {**settings, "hook": ("layer_2",), "min_norm": 0.1}
    added = train_sae(**options, name="added")
    whole = train_sae(**{**options, "cache": str(both.out_path)}, name="whole")
    assert_same(added.folder, whole.folder)
    stopped = interrupted(10, **options, name="stopped")
    assert_same(resume_training(stopped).folder, whole.folder)
    crossing = train_sae(**{**settings, "type": "crosscoder", "hook": ("layer_1", "layer_2")}, name="both")
    assert crossing.summary["eval"]["fvu"] < 2


def test_codes_belong_to_the_rows_that_they_were_computed_of(
    config: HarvestConfig, settings: dict[str, object]
) -> None:
    folder = train_sae(**settings, name="run").folder
    before = open_source(folder, device="cpu")
    codes = before.encode(0, 50).dense()
    add_hooks(config.out_path, WhereConfig(layers=(2,)), quiet=True)
    added = open_source(folder, device="cpu")
    assert (added.identity, added.place) == (before.identity, before.place)  # nothing of theirs has changed
    harvest(config, extend=True, max_tokens=1500)
    extended = open_source(folder, device="cpu")
    assert extended.place != before.place
    assert extended.cache.n_rows > before.cache.n_rows
    np.testing.assert_array_equal(extended.encode(0, 50).dense(), codes)
    shutil.rmtree(config.out_path / "added")
    assert open_source(folder, device="cpu").identity == extended.identity
