# ruff: noqa: F811
"""What `plan` tells of an extension and of an addition is what they take; `--probe` measures."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from cache_kit import contents
from command_kit import invoke, refused
from test_harvest_extend import config, harvest, models  # noqa: F401
from test_harvest_resume import write_corpus

from sae_granary import open_cache
from sae_granary.harvest.cli import app
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.replay.add import add_hooks, prepare_addition
from sae_granary.harvest.replay.growth import plan_addition, plan_growth
from sae_granary.models.config import WhereConfig

LAYER_2 = WhereConfig(layers=(2,))


def disk_bytes(path: Path) -> int:
    """Of the files of a cache, those of several names once; `about.json` and the log apart."""
    files = {os.stat(file).st_ino: file.stat().st_size for file in path.rglob("*") if file.is_file()}
    return sum(files.values()) - sum((path / n).stat().st_size for n in ("about.json", "harvest.log"))


def said(message: str) -> None:
    pass


@pytest.mark.slow
def test_bytes_of_an_extension_and_an_addition_are_planned_within_2_percent(config: HarvestConfig) -> None:
    corpus = write_corpus(config.out_path.with_name("long.txt"), 1000)
    config = replace(config, rows_per_shard=4096, text=replace(config.text, dataset=str(corpus)))
    harvest(config, max_tokens=8000)
    before = disk_bytes(config.out_path)
    more = replace(config, extend=True, max_tokens=20_000)
    plan = plan_growth(more, said)
    harvest(more)
    extended = disk_bytes(config.out_path)
    assert plan.n_rows == pytest.approx(open_cache(config.out_path).n_rows - 8000, rel=0.02)
    assert plan.n_bytes == pytest.approx(extended - before, rel=0.02)
    assert plan_growth(more, said).n_rows == 0
    addition = plan_addition(*prepare_addition(config.out_path, LAYER_2, {}, said))
    add_hooks(config.out_path, LAYER_2, quiet=True)
    assert addition.n_rows == open_cache(config.out_path).n_rows
    assert addition.n_bytes == pytest.approx(disk_bytes(config.out_path) - extended, rel=0.02)
    assert plan_addition(*prepare_addition(config.out_path, LAYER_2, {}, said)).n_rows == 0


def test_a_probe_measures_and_writes_nothing(config: HarvestConfig) -> None:
    harvest(config)
    before = contents(config.out_path)
    given = (app, "add", "--to", config.out_path, "--layer", 2, "--probe")
    told = invoke(*given, "0.2s").stdout
    assert "tokens/s over the first" in told
    assert "without writing" in told
    assert "--probe soon: expected a time above 0, such as 30s or 2min" in refused(*given, "soon")
    assert contents(config.out_path) == before
