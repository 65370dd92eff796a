"""Advice to read ahead: what a pool takes, in few calls, and a switch that turns it off."""

import os

import numpy as np
import pytest

from sae_granary.cache.errors import SelectionError
from sae_granary.cache.format.layout import ArrayLayout
from sae_granary.cache.format.storage import STORAGE
from sae_granary.cache.load.order import PoolPlan, ShardPart
from sae_granary.cache.load.readahead import VARIABLE, read_ahead
from sae_granary.cache.read.arrays import RowArray

N_ROWS, BLOCK_ROWS, ROW_BYTES = 4096, 4, 1024
BLOCK = BLOCK_ROWS * ROW_BYTES

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")


@pytest.fixture
def files(tmp_path):
    array = RowArray(tmp_path, ArrayLayout("a", STORAGE["float32"], ROW_BYTES // 4, N_ROWS, N_ROWS), [(0, N_ROWS)])
    array.path(0).parent.mkdir()
    array.path(0).write_bytes(bytes(array.layout.shard_bytes(N_ROWS)))
    return [array]


@pytest.fixture
def advised(monkeypatch):
    """The (first byte, bytes) of each advice given."""
    given, original = [], os.posix_fadvise

    def advise(descriptor, start, n_bytes, advice) -> None:
        given.append((start, n_bytes))
        original(descriptor, start, n_bytes, advice)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return given


def plan(blocks) -> PoolPlan:
    return PoolPlan((ShardPart(0, np.array(blocks), N_ROWS, BLOCK_ROWS),))


def test_small_gaps_are_read_too(files, advised) -> None:
    read_ahead(files, plan(range(0, 1024, 8)))  # gaps of 28 kB
    assert advised == [(0, (1016 + 1) * BLOCK)]


def test_blocks_far_apart_are_announced_one_by_one(files, advised) -> None:
    read_ahead(files, plan([1, 2, 500, 1000]))
    assert advised == [(BLOCK, 2 * BLOCK), (500 * BLOCK, BLOCK), (1000 * BLOCK, BLOCK)]


def test_the_switch(files, advised, monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    read_ahead(files, plan([1, 500]))
    assert advised == []
    monkeypatch.setenv(VARIABLE, "off")
    with pytest.raises(SelectionError, match="GRANARY_READ_AHEAD='off': expected 0 or 1"):
        read_ahead(files, plan([1]))
