# ruff: noqa: F811
"""What is done with a complete cache that was harvested in blocks: hook points are added, damaged files repaired."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_kit import contents, flip
from harvest_kit import CutOff, cut_off_after, packed
from test_harvest_add import same_arrays
from test_harvest_ranks import config, together  # noqa: F401
from test_harvest_resume import assert_same_cache

from sae_granary import open_cache
from sae_granary.cache.read.verify import verify
from sae_granary.common.errors import ConfigError
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.errors import HarvestError
from sae_granary.harvest.replay.add import add_hooks
from sae_granary.harvest.replay.on_rows import RowsDifferError
from sae_granary.harvest.replay.repair import repair
from sae_granary.harvest.run import harvest_activations
from sae_granary.models.config import WhereConfig

LAYER_2 = WhereConfig(layers=(2,))


@pytest.mark.parametrize(("pack", "n_batches"), [(False, 50), pytest.param(True, 37, marks=pytest.mark.slow)])
def test_added_arrays_are_those_of_a_harvest_that_had_them_from_the_start(
    config: HarvestConfig, pack: bool, n_batches: int
) -> None:
    config = replace(packed(config) if pack else config, max_tokens=1400, rows_per_shard=256)  # ends in a block
    config = replace(config, tokens=replace(config.tokens, batch_tokens=32))
    both = replace(config, where=WhereConfig(layers=(1, 2)), out=config.out_path.with_name("both"))
    cut = replace(config, out=config.out_path.with_name("cut"))
    for one in (config, both, cut):
        harvest_activations(one, quiet=True)
    before = contents(config.out_path)
    result = add_hooks(config.out_path, LAYER_2, quiet=True)
    assert before.items() <= contents(config.out_path).items()
    cache, want = open_cache(config.out_path), open_cache(both.out_path)
    assert [r.block for r in cache.records] == [r.block for r in cache.additions[0].manifest.shards]
    assert len({record.block for record in cache.records}) > 1
    assert same_arrays(result.path, both.out_path, "layer_2")
    np.testing.assert_array_equal(cache.hook("layer_2")[:], want.hook("layer_2")[:])
    assert verify(config.out_path).ok
    assert add_hooks(config.out_path, LAYER_2, quiet=True).already_complete

    with pytest.raises(CutOff), cut_off_after(n_batches):  # in the second sort buffer of the second block
        add_hooks(cut.out_path, LAYER_2, quiet=True)
    assert open_cache(cut.out_path / "added/layer_2", allow_incomplete=True).records[-1].block == 1
    add_hooks(cut.out_path, LAYER_2, quiet=True)
    assert_same_cache(cut.out_path, config.out_path)


@pytest.mark.slow
@pytest.mark.parametrize("pack", [False, True])
def test_damaged_files_come_back_byte_for_byte(config: HarvestConfig, pack: bool) -> None:
    config = replace(packed(config) if pack else config, max_tokens=1400, rows_per_shard=256)
    harvest_activations(config, quiet=True)
    add_hooks(config.out_path, LAYER_2, quiet=True)
    path, before = config.out_path, contents(config.out_path)
    last = len(open_cache(path).records) - 1
    (path / "activations/layer_1/c.1.0").unlink()
    os.truncate(path / f"norms/layer_1/c.{last}", 10)  # of the block with which the harvest ended
    flip(path / "documents/00000002.parquet")
    (path / "commits/00000004.json").unlink()
    flip(path / "vocabulary.json", 20)
    flip(path / "added/layer_2/activations/layer_2/c.3.0")
    with pytest.raises(CutOff), cut_off_after(2):
        repair(path, quiet=True)
    assert sum(len(damage.files) for damage in repair(path, quiet=True)) > 3
    found = {name: data for name, data in contents(path).items() if name in before}
    assert found == before
    assert verify(path).ok


@pytest.mark.slow
def test_other_text_is_refused(config: HarvestConfig) -> None:
    config = replace(config, max_tokens=1000)
    harvest_activations(config, quiet=True)
    corpus = Path(config.text.dataset)
    lines = corpus.read_text().split("\n")
    corpus.write_text("\n".join([*lines[:30], "salt water fire", *lines[31:]]))
    with pytest.raises((RowsDifferError, HarvestError), match="the text or the tokenizer"):
        add_hooks(config.out_path, LAYER_2, quiet=True)
    with pytest.raises(ConfigError, match=r"text of .* has changed since it was harvested, and a cache in blocks"):
        harvest_activations(replace(config, max_tokens=1300, extend=True), quiet=True)
    records = open_cache(config.out_path).records
    shard = next(r.shard for r in records if r.documents and r.documents.first <= 30 <= r.documents.last)
    flip(config.out_path / f"activations/layer_1/c.{shard}.0")
    with pytest.raises(HarvestError, match=r"lost are \d+ rows"):
        repair(config.out_path, quiet=True)


@pytest.mark.slow
def test_one_byte_per_value_in_blocks(config: HarvestConfig) -> None:
    """The bytes do not depend on who harvests the blocks, and come again."""
    config = replace(config, dtype="int8", max_tokens=1400)
    plain = replace(config, out=config.out_path.with_name("plain"), block_docs=None)
    both = replace(config, where=WhereConfig(layers=(1, 2)), out=config.out_path.with_name("both"))
    cut = replace(config, out=config.out_path.with_name("cut"))
    for one in (config, plain, both):
        harvest_activations(one, quiet=True)
    cache = open_cache(config.out_path)
    assert (cache.manifest.version, cache.manifest.dtype, verify(config.out_path).ok) == (3, "int8", True)
    assert np.allclose(cache.hook()[:], open_cache(plain.out_path).hook()[:], rtol=0, atol=0.05)
    with pytest.raises(CutOff), cut_off_after(32):  # the first batches twice: to fit them, and as rows
        harvest_activations(cut, quiet=True)
    together(cut, 2)
    assert_same_cache(cut.out_path, config.out_path)
    add_hooks(config.out_path, LAYER_2, quiet=True)
    assert same_arrays(config.out_path / "added/layer_2", both.out_path, "layer_2")
    before = contents(config.out_path)
    for name in ("scales/layer_1/c.1", "activations/layer_1/c.2.0", "commits/00000000.json"):
        (config.out_path / name).unlink()
    (config.out_path / "affine/layer_1/step/c.0").unlink()
    repair(config.out_path, quiet=True)
    assert {name: contents(config.out_path)[name] for name in before if "harvest.log" not in name} == before


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_an_extended_cache_in_blocks(config: HarvestConfig, dtype: str) -> None:
    """Its last block is continued as another harvest; the same bytes for any number of workers and after a crash."""
    short = replace(config, dtype=dtype, max_tokens=800, rows_per_shard=256)
    more = replace(short, max_tokens=1300, extend=True)
    plain = replace(short, max_tokens=1300, block_docs=None, out=config.out_path.with_name("plain"))
    both = config.out_path.with_name("both")
    cut = config.out_path.with_name("cut")
    harvest_activations(plain, quiet=True)
    for path, where in ((config.out_path, short.where), (cut, short.where), (both, WhereConfig(layers=(1, 2)))):
        harvest_activations(replace(short, out=path, where=where), quiet=True)
    n_old = open_cache(config.out_path).n_rows
    add_hooks(config.out_path, LAYER_2, quiet=True)
    harvest_activations(more, quiet=True)
    harvest_activations(replace(more, out=both, where=WhereConfig(layers=(1, 2))), quiet=True)
    with pytest.raises(CutOff), cut_off_after(14):
        harvest_activations(replace(more, out=cut), quiet=True)
    assert (open_cache(cut).n_rows, verify(cut).ok) == (n_old, True)
    together(replace(more, out=cut), 2)

    cache, want = open_cache(config.out_path), open_cache(plain.out_path)
    assert cache.n_rows == want.n_rows > n_old
    for name in ("token_id", "doc_id", "position", "doc_position", "flags"):
        assert np.array_equal(cache.column(name)[:], want.column(name)[:])
    assert cache.manifest.summary == want.manifest.summary
    assert [r.block for r in cache.records] == sorted(r.block or 0 for r in cache.records)
    n_before = cache.manifest.extended[0]["n_shards"]
    assert cache.records[n_before - 1].block == cache.records[n_before].block == 1  # it ended in this block
    assert harvest_activations(more, quiet=True).already_complete
    add_hooks(config.out_path, LAYER_2, quiet=True)
    assert same_arrays(config.out_path / "added/layer_2", both, "layer_2")
    mine = {name: data for name, data in contents(config.out_path).items() if not name.startswith("added")}
    assert {name: data for name, data in contents(cut).items() if name in mine} == mine
    before = contents(config.out_path)
    for record in cache.records:
        (config.out_path / f"norms/layer_1/c.{record.shard}").unlink()
    repair(config.out_path, quiet=True)
    assert {name: contents(config.out_path)[name] for name in before if name != "harvest.log"} == {
        name: data for name, data in before.items() if name != "harvest.log"
    }
    assert not (config.out_path / "blocks").exists()
