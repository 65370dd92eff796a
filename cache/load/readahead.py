"""Ask the kernel to read a pool's blocks from the disk, in order, before rows are taken from them at random."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from sae_granary.cache.load.order import PoolPlan, ShardPart

MERGED_GAP = 128 * 2**10  # bytes between two blocks that are read rather than told apart: a disk reads so much at once
COLD_FAULTS = 64  # page faults that waited for the disk since the last pool: the cache is not in memory
PROBES = 64  # bytes of a pool that are looked for in memory, per hook point


class ReadAhead:
    """Advice for the pools that do not lie in memory: about a microsecond per block, which the others should not pay.

    Where the system cannot tell, the first pool gets it, and later ones while reading still waits for the disk.
    """

    def __init__(self, files: Sequence[Sequence[tuple[Path, int]]]) -> None:
        self._files = files  # of each hook point: (path, bytes per row) of each pinned shard
        self._faults: int | None = None

    def advise(self, plan: PoolPlan, wanted: Callable[[], PoolPlan]) -> None:
        """Announce the rows of a pool that are wanted, if those of its whole plan are not in memory."""
        faults = _major_faults()
        waited = self._faults is None or faults - self._faults > COLD_FAULTS
        self._faults = faults
        in_memory = _in_memory(self._files, plan)
        if not hasattr(os, "posix_fadvise") or in_memory or (in_memory is None and not waited):
            return
        parts = wanted().parts
        for shards in self._files:
            for part in parts:
                path, row_bytes = shards[part.shard]
                with _open(path) as descriptor:
                    _advise(descriptor, part, row_bytes)


def _advise(descriptor: int, part: ShardPart, row_bytes: int) -> None:
    block_bytes = part.block_rows * row_bytes
    ends = np.flatnonzero(np.diff(part.blocks) > 1 + MERGED_GAP // block_bytes)
    firsts = part.blocks[np.concatenate([[0], ends + 1])]
    lasts = part.blocks[np.concatenate([ends, [len(part.blocks) - 1]])]
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        n_bytes = (last - first + 1) * block_bytes
        os.posix_fadvise(descriptor, first * block_bytes, n_bytes, os.POSIX_FADV_WILLNEED)


def _in_memory(files: Sequence[Sequence[tuple[Path, int]]], plan: PoolPlan) -> bool | None:
    """Whether a byte of each of some blocks can be read without waiting; None where the system cannot tell."""
    if not hasattr(os, "RWF_NOWAIT") or not hasattr(os, "preadv"):
        return None
    step = max(sum(len(part.blocks) for part in plan.parts) // PROBES, 1)
    byte = bytearray(1)
    try:
        for shards in files:
            for part in plan.parts:
                path, row_bytes = shards[part.shard]
                with _open(path) as descriptor:
                    for block in part.blocks[step // 2 :: step].tolist():
                        os.preadv(descriptor, [byte], block * part.block_rows * row_bytes, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:  # the file system does not know
        return None
    return True


@contextlib.contextmanager
def _open(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _major_faults() -> int:
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
