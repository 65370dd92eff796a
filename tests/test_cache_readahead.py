"""Advice to read ahead: for what does not lie in memory, and for that only."""

import os

import numpy as np
import pytest

from sae_granary.cache.load.order import PoolPlan, ShardPart
from sae_granary.cache.load.readahead import ReadAhead

N_ROWS, BLOCK_ROWS, ROW_BYTES = 4096, 4, 1024


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "shard"
    path.write_bytes(bytes(N_ROWS * ROW_BYTES))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path


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


def test_a_pool_in_memory_gets_no_advice_and_a_cold_one_does(shard, advised) -> None:
    with shard.open("rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except (OSError, AttributeError):
            pytest.skip("this file system does not say what lies in memory")
    pool = plan(range(0, 1024, 8))
    reader = ReadAhead([[(shard, ROW_BYTES)]])
    reader.advise(pool, lambda: pytest.fail("nobody needs it"))
    assert advised == []
    with shard.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        advised.clear()
        try:
            os.preadv(file.fileno(), [bytearray(1)], 4_000_000, os.RWF_NOWAIT)
            pytest.skip("this file system lies in memory")
        except OSError:
            pass
    reader.advise(pool, lambda: pool)  # though no read has waited yet
    assert advised == [(0, (1016 + 1) * BLOCK_ROWS * ROW_BYTES)]  # gaps of 28 kB are read too


def test_only_the_rows_that_are_wanted_are_announced_one_by_one_where_far_apart(shard, advised, monkeypatch) -> None:
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)  # as on a system that cannot tell
    ReadAhead([[(shard, ROW_BYTES)]]).advise(plan(range(1024)), lambda: plan([1, 2, 500, 1000]))
    block = BLOCK_ROWS * ROW_BYTES
    assert advised == [(block, 2 * block), (500 * block, block), (1000 * block, block)]


def test_where_the_system_cannot_tell_pools_are_announced_while_reading_waits(shard, advised, monkeypatch) -> None:
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    faults = iter([0, 65, 200, 210])  # page faults that waited for the disk, as each pool begins
    monkeypatch.setattr("sae_granary.cache.load.readahead._major_faults", lambda: next(faults))
    reader, counts = ReadAhead([[(shard, ROW_BYTES)]]), []
    for _ in range(4):
        advised.clear()
        reader.advise(plan([1, 500]), lambda: plan([1, 500]))
        counts.append(len(advised))
    assert counts == [2, 2, 2, 0]
