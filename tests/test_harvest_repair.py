# ruff: noqa: F811
"""Damaged files of a cache come back byte for byte: their rows are harvested again."""

import os
import shutil
from pathlib import Path

import pytest
from cache_kit import contents, flip
from command_kit import invoke
from harvest_kit import packed
from test_harvest_extend import config, harvest, models  # noqa: F401

from sae_granary import open_cache
from sae_granary.cache.read.verify import verify
from sae_granary.harvest.cli import app
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.errors import HarvestError
from sae_granary.harvest.replay.add import add_hooks
from sae_granary.harvest.replay.damage import find_damage
from sae_granary.harvest.replay.repair import repair
from sae_granary.models.config import WhereConfig


def damage_each_kind(path: Path) -> int:
    """Missing, truncated, flipped files of rows, documents, records, metadata and vocabulary; how many."""
    (path / "activations/layer_1/c.1.0").unlink()
    os.truncate(path / "norms/layer_1/c.3", 10)
    flip(path / "rows/token_id/c.3")
    flip(path / "documents/00000002.parquet")
    flip(path / "commits/00000000.json")
    (path / "commits/00000004.json").unlink()
    flip(path / "rows/zarr.json", 5)
    flip(path / "vocabulary.json", 20)
    n_flags = len(list((path / "rows/flags").iterdir()))
    shutil.rmtree(path / "rows/flags")
    return 8 + n_flags


@pytest.fixture
def grown(config: HarvestConfig) -> HarvestConfig:
    """A cache that was extended, with an added hook point."""
    harvest(config)
    harvest(config, extend=True, max_tokens=1500)
    add_hooks(config.out_path, WhereConfig(layers=(2,)), quiet=True)
    return config


def test_every_kind_of_damage_is_repaired_to_the_original_bytes(grown: HarvestConfig) -> None:
    path = grown.out_path
    before = contents(path)
    flip(path / "added/layer_2/activations/layer_2/c.2.0")
    assert [found.path for found in verify(path).problems] == ["added/layer_2/activations/layer_2/c.2.0"]
    n = damage_each_kind(path)
    broken = contents(path)
    found = invoke(app, "repair", path, "--dry-run", code=1).stdout
    damages = find_damage(path)
    assert found.count("damaged: ") == sum(len(damage.files) for damage in damages) == n + 1
    assert contents(path) == broken
    invoke(app, "repair", path, "--quiet", "--device", "cpu")
    assert contents(path) == before
    assert verify(path).ok
    log = (path / "harvest.log").read_text().splitlines()
    assert [line.partition(" ")[2] for line in log[-2:]] == [
        f"repaired {len(damage.files)} files of {damage.path}" for damage in damages
    ]
    assert "nothing to repair" in invoke(app, "repair", path).stdout


@pytest.mark.slow
def test_packed_rows_of_a_decoder_are_repaired(config: HarvestConfig, models: dict[str, str]) -> None:
    harvest(packed(config, models["llama"]))
    before = contents(config.out_path)
    flip(config.out_path / "activations/layer_1/c.1.0")
    repair(config.out_path, quiet=True)
    assert contents(config.out_path) == before


@pytest.mark.slow
def test_without_the_source_it_is_said_what_is_lost_and_nothing_is_written(config: HarvestConfig) -> None:
    harvest(config)
    flip(config.out_path / "activations/layer_1/c.1.0")
    before, n_rows = contents(config.out_path), open_cache(config.out_path).records[1].n_rows
    corpus = Path(config.text.dataset)
    text = corpus.read_text()
    lost = rf"lost are {n_rows} rows \(row ids 256 to {256 + n_rows - 1}\), unless a copy has them"
    corpus.unlink()
    with pytest.raises(Exception, match=rf"corpus.txt.*{lost}"):
        repair(config.out_path, quiet=True)
    lines = text.split("\n")
    corpus.write_text("\n".join([*lines[:5], "another text instead", *lines[6:]]))
    with pytest.raises(HarvestError, match=rf"shard 1 of .* does not come out as it was: .*{lost}"):
        repair(config.out_path, quiet=True)
    assert contents(config.out_path) == before
    corpus.rename(corpus.with_name("moved.txt"))
    corpus.with_name("moved.txt").write_text(text)
    assert len(repair(config.out_path, dataset=str(corpus.with_name("moved.txt")), quiet=True)) == 1
    assert verify(config.out_path).ok
