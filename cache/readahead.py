"""Ask the kernel to read a pool's blocks from the disk, in order, before rows are taken from them at random."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cache.order import PoolPlan, ShardPart

MERGED_GAP = 128 * 2**10  # bytes between two blocks that are read rather than told apart: a disk reads so much at once
COLD_FAULTS = 64  # page faults that waited for the disk since the last pool: the cache is not in memory
PROBES = 32  # bytes of the first pool that are looked for in memory, per file


class ReadAhead:
    """Advice for each pool while reading still waits for the disk, and for a first pool that does not lie in memory.

    The advice costs about a microsecond per block, which a cache that lies in memory should not pay.
    """

    def __init__(self, files: Sequence[Sequence[tuple[Path, int]]]) -> None:
        self._files = files  # of each hook point: (path, bytes per row) of each pinned shard
        self._faults: int | None = None

    def advise(self, plan: Callable[[], PoolPlan]) -> None:
        """Announce the rows of a pool, whose plan is asked for when there is need to."""
        faults = _major_faults()
        first, since = self._faults is None, faults - (self._faults or 0)
        self._faults = faults
        if not hasattr(os, "posix_fadvise") or not (first or since > COLD_FAULTS):
            return
        parts = plan().parts
        for shards in self._files:
            for part in parts:
                path, row_bytes = shards[part.shard]
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    if not (first and _in_memory(descriptor, part, row_bytes)):
                        _advise(descriptor, part, row_bytes)
                finally:
                    os.close(descriptor)


def _advise(descriptor: int, part: ShardPart, row_bytes: int) -> None:
    block_bytes = part.block_rows * row_bytes
    ends = np.flatnonzero(np.diff(part.blocks) > 1 + MERGED_GAP // block_bytes)
    firsts = part.blocks[np.concatenate([[0], ends + 1])]
    lasts = part.blocks[np.concatenate([ends, [len(part.blocks) - 1]])]
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        n_bytes = (last - first + 1) * block_bytes
        os.posix_fadvise(descriptor, first * block_bytes, n_bytes, os.POSIX_FADV_WILLNEED)


def _in_memory(descriptor: int, part: ShardPart, row_bytes: int) -> bool:
    """Whether a byte of each of some blocks can be read without waiting; False where the system cannot tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    probed = part.blocks[:: max(len(part.blocks) // PROBES, 1)]
    byte = bytearray(1)
    try:
        return all(
            os.preadv(descriptor, [byte], block * part.block_rows * row_bytes, os.RWF_NOWAIT) == 1
            for block in probed.tolist()
        )
    except OSError:  # EAGAIN: not in memory; EOPNOTSUPP: the file system does not know
        return False


def _major_faults() -> int:
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
