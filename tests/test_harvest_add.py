# ruff: noqa: F811
"""Hook points are added to the rows of a complete cache, byte-equal to a harvest that had them from the start."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_kit import contents
from harvest_kit import CutOff, build_model, cut_off_after, packed
from test_harvest_extend import config, harvest, models  # noqa: F401

from sae_granary import open_cache
from sae_granary.cache.errors import CacheError, CacheLockedError, UnknownNameError
from sae_granary.cache.read.listing import list_caches
from sae_granary.cache.read.verify import verify
from sae_granary.cache.write import session
from sae_granary.common.errors import ConfigError
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.errors import HarvestError
from sae_granary.harvest.replay.add import add_hooks
from sae_granary.harvest.replay.on_rows import RowsDifferError
from sae_granary.models.config import WhereConfig
from sae_granary.models.errors import ModelError
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.data.run_data import RunData

LAYER_2 = WhereConfig(layers=(2,))


def add(path: Path, where: WhereConfig = LAYER_2, **options: object) -> object:
    return add_hooks(path, where, quiet=True, **options)


def same_arrays(added: Path, whole: Path, hook: str) -> bool:
    names = [
        f"{kind}/{hook}/{file.name}" for kind in ("activations", "norms") for file in (whole / kind / hook).iterdir()
    ]
    return all((added / name).read_bytes() == (whole / name).read_bytes() for name in names)


@pytest.mark.parametrize("pack", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_added_arrays_are_those_of_a_harvest_that_had_them_from_the_start(
    config: HarvestConfig, models: dict[str, str], pack: bool
) -> None:
    config = packed(config, models["llama"]) if pack else config
    both = replace(config, where=WhereConfig(layers=(1, 2)), out=config.out_path.with_name("both"))
    harvest(config)
    harvest(both)
    before = contents(config.out_path)
    result = add(config.out_path)
    after = contents(config.out_path)
    assert before == {name: after[name] for name in before}
    assert same_arrays(config.out_path / "added/layer_2", both.out_path, "layer_2")
    cache, want = open_cache(config.out_path), open_cache(both.out_path)
    assert tuple(cache.hook_points) == tuple(want.hook_points) == ("layer_1", "layer_2")
    np.testing.assert_array_equal(cache.hook("layer_2")[5:900:7], want.hook("layer_2")[5:900:7])
    np.testing.assert_array_equal(cache.norms("layer_2")[:], want.norms("layer_2")[:])
    assert cache.stats("layer_2").n_rows == result.n_rows == cache.n_rows
    assert cache.hook_name() == "layer_1"  # commands that name none read what they read before
    assert verify(config.out_path).ok
    assert verify(config.out_path).foreign == ()
    assert list_caches(config.out_path)[0].hook_points == ("layer_1", "layer_2")
    assert add(config.out_path).already_complete


@pytest.mark.slow
def test_an_extended_cache_gets_the_rows_that_the_addition_lacks(config: HarvestConfig) -> None:
    both = replace(config, where=WhereConfig(layers=(1, 2)), out=config.out_path.with_name("both"))
    for one in (config, both):
        harvest(one)
    add(config.out_path)
    for one in (config, both):
        harvest(one, extend=True, max_tokens=1500)
    cache = open_cache(config.out_path)
    n_old = cache.manifest.extended[0]["n_shards"]
    assert tuple(open_cache(config.out_path, shards=range(n_old)).hook_points) == ("layer_1", "layer_2")
    with pytest.raises(UnknownNameError, match=rf"layer_2 was added to {n_old} of {len(cache.records)} shards: .*add"):
        cache.hook("layer_2")
    assert "warning: layer_2, added before, gets no further rows" in (config.out_path / "harvest.log").read_text()
    with pytest.raises(ConfigError, match=rf"'layer_2' for all of its rows; layer_2 was added to {n_old} of .*add"):
        RunData.open(TrainConfig(cache=str(config.out_path), hook=("layer_2",)))
    add(config.out_path)
    assert same_arrays(config.out_path / "added/layer_2", both.out_path, "layer_2")
    fresh = config.out_path.with_name("fresh")
    harvest(config, out=fresh)
    harvest(config, out=fresh, extend=True, max_tokens=1500)
    add(fresh)  # all at once, over the end of the first harvest
    assert same_arrays(fresh / "added/layer_2", both.out_path, "layer_2")


@pytest.mark.slow
def test_rows_documents_and_vocabulary_take_no_room_twice(config: HarvestConfig) -> None:
    harvest(config)
    add(config.out_path)
    for name in ("rows/token_id/c.0", "documents/00000000.parquet"):
        assert (config.out_path / name).samefile(config.out_path / "added/layer_2" / name)
    assert not (config.out_path / "added/layer_2/vocabulary.json").exists()


@pytest.mark.slow
def test_another_source_is_refused_with_what_differs(config: HarvestConfig, tmp_path: Path) -> None:
    harvest(config)
    before = contents(config.out_path)
    corpus = Path(config.text.dataset)
    text = corpus.read_text()
    corpus.write_text(text.replace("fox", "dog", 1))
    with pytest.raises(RowsDifferError, match=r"row [\d,]+ \(document \d+\) has token_id \d+, but .* holds \d+"):
        add(config.out_path)
    corpus.write_text(text)
    with pytest.raises(HarvestError, match=r"weights_xxh3: the cache has '[0-9a-f]+', now it is"):
        add(config.out_path, model=str(build_model(tmp_path / "other", "bert", seed=1)))
    same = build_model(tmp_path / "same", "bert")
    tokenizer = json.loads((same / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["fox"], vocabulary["dog"] = vocabulary["dog"], vocabulary["fox"]
    (same / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(HarvestError, match="tokenizer_xxh3"):
        add(config.out_path, model=str(same))
    assert contents(config.out_path) == before
    moved = build_model(tmp_path / "moved", "bert")
    assert add(config.out_path, model=str(moved)).n_rows == open_cache(config.out_path).n_rows


def test_hook_points_that_are_there_or_that_the_model_lacks(config: HarvestConfig) -> None:
    harvest(config, where=WhereConfig(layers=(0, 1)))
    with pytest.raises(ConfigError, match="was harvested with hook point layer_1"):
        add(config.out_path, WhereConfig(layers=(1, 2)))
    with pytest.raises((ModelError, ConfigError), match=r"7"):
        add(config.out_path, WhereConfig(layers=(7,)))
    with pytest.raises(CacheError, match="does not exist"):
        add(config.out_path.with_name("none"))
    assert not (config.out_path / "added").exists()
    with pytest.raises(CutOff), cut_off_after(30):
        add(config.out_path)
    with pytest.raises(ConfigError, match=r"layer_2 is being added to .* with layer_2: name all of these"):
        add(config.out_path, WhereConfig(layers=(2,), hooks=("encoder.layer.0.attention",)))
    lock = session.locked(config.out_path / "added/layer_2")
    with pytest.raises(CacheLockedError, match="process"):
        add(config.out_path)
    lock.release()
