# ruff: noqa: F811
"""What is done with a complete cache that was harvested in blocks: hook points are added, damaged files repaired."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_kit import no_sync  # noqa: F401
from harvest_kit import CutOff, build_model, cut_off_after
from test_harvest_add import same_arrays
from test_harvest_ranks import config, together  # noqa: F401
from test_harvest_repair import flip
from test_harvest_resume import assert_same_cache, contents

from sae_granary import open_cache
from sae_granary.cache.read.verify import verify
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.errors import HarvestError
from sae_granary.harvest.replay.add import add_hooks
from sae_granary.harvest.replay.on_rows import RowsDifferError
from sae_granary.harvest.replay.repair import repair
from sae_granary.harvest.run import harvest_activations
from sae_granary.models.config import WhereConfig

LAYER_2 = WhereConfig(layers=(2,))


def packed(config: HarvestConfig) -> HarvestConfig:
    model = build_model(Path(config.model.model).parent / "decoder", "llama")
    return replace(config, model=replace(config.model, model=str(model)), tokens=replace(config.tokens, pack=True))


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


@pytest.mark.parametrize("pack", [False, pytest.param(True, marks=pytest.mark.slow)])
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


def test_other_text_is_refused(config: HarvestConfig) -> None:
    harvest_activations(config, quiet=True)
    corpus = Path(config.text.dataset)
    lines = corpus.read_text().split("\n")
    corpus.write_text("\n".join([*lines[:30], "salt water fire", *lines[31:]]))
    with pytest.raises((RowsDifferError, HarvestError), match="the text or the tokenizer"):
        add_hooks(config.out_path, LAYER_2, quiet=True)
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
