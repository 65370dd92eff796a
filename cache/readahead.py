"""Ask the kernel to read a pool's blocks from the disk, in order, before rows are taken from them at random."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cache.order import PoolPlan

MERGED_GAP = 128 * 2**10  # bytes between two blocks that are read rather than told apart: a disk reads so much at once
COLD_FAULTS = 64  # page faults that waited for the disk since the last pool: the cache is not in memory


class ReadAhead:
    """Advice for each pool while reading still waits for the disk, and for the first pool in any case.

    The advice costs about a microsecond per block, which a cache that lies in memory should not pay for every pool.
    """

    def __init__(self, files: Sequence[Sequence[tuple[Path, int]]]) -> None:
        self._files = files  # of each hook point: (path, bytes per row) of each pinned shard
        self._faults: int | None = None

    def advise(self, plan: Callable[[], PoolPlan]) -> None:
        """Announce the rows of a pool, whose plan is asked for when there is need to."""
        faults = _major_faults()
        cold = self._faults is None or faults - self._faults > COLD_FAULTS
        self._faults = faults
        if not cold or not hasattr(os, "posix_fadvise"):
            return
        parts = plan().parts
        for shards in self._files:
            for part in parts:
                path, row_bytes = shards[part.shard]
                block_bytes = part.block_rows * row_bytes
                ends = np.flatnonzero(np.diff(part.blocks) > 1 + MERGED_GAP // block_bytes)
                firsts = part.blocks[np.concatenate([[0], ends + 1])]
                lasts = part.blocks[np.concatenate([ends, [len(part.blocks) - 1]])]
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
                        n_bytes = (last - first + 1) * block_bytes
                        os.posix_fadvise(descriptor, first * block_bytes, n_bytes, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)


def _major_faults() -> int:
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
