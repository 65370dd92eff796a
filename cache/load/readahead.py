"""Read a pool's blocks from files; ask the kernel to read them, in order, before rows are taken from them at random.

Rows that are in memory are announced too: to look for them first (RWF_NOWAIT) would miss the holes of sparse files.
Switch: the environment variable GRANARY_READ_AHEAD, 1 (default) or 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_granary.cache.errors import CorruptCacheError, SelectionError
from sae_granary.cache.load.order import Copy, PoolPlan
from sae_granary.cache.read.arrays import RowArray
from sae_granary.common.process import most_maps

VARIABLE = "GRANARY_READ_AHEAD"
OPEN_FILES = 256  # that are announced and read at a time, in each thread
MERGED_GAP = 128 * 2**10  # smaller gaps between two blocks are read too: a disk reads so many bytes at once


class ShardFiles:
    """The rows of an array over more shards than can be mapped at once: files are opened, read and closed again.

    The `skipped` first rows of each shard are left out.
    """

    def __init__(self, array: RowArray, skipped: int) -> None:
        self._array, self._skipped = array, skipped

    def copies(self, plan: PoolPlan, out: NDArray[Any]) -> Iterator[Copy]:
        """Calls that read the rows of a plan to out (n_rows, ...), in any order; each has some files open."""
        runs, n_files = plan.runs(), max(min(OPEN_FILES, most_maps() // 8), 1)
        ends = np.cumsum(runs[:, 2] - runs[:, 1]).tolist()
        for i in range(0, len(runs), n_files):
            yield partial(self._read, runs[i : i + n_files].tolist(), out[ends[i - 1] if i else 0 :])

    def _read(self, runs: list[list[int]], out: NDArray[Any]) -> None:
        """Open and announce all of them before the first is read: a disk works on many requests at once."""
        row_bytes, target = self._array.layout.row_bytes, out.reshape(-1).view(np.uint8).data
        announces, opened, done = _announces(), dict[int, int](), 0
        try:
            for shard, first, end in runs:
                if shard not in opened:
                    opened[shard] = self._array.open(shard)
                if announces:
                    place = (first + self._skipped) * row_bytes
                    os.posix_fadvise(opened[shard], place, (end - first) * row_bytes, os.POSIX_FADV_WILLNEED)
            for shard, first, end in runs:
                n_bytes = (end - first) * row_bytes
                self._fill(shard, opened[shard], target[done : done + n_bytes], (first + self._skipped) * row_bytes)
                done += n_bytes
        finally:
            for descriptor in opened.values():
                os.close(descriptor)

    def _fill(self, shard: int, descriptor: int, target: memoryview, place: int) -> None:
        while len(target):
            n = _read_at(descriptor, target, place)
            if not n:
                raise CorruptCacheError(f"{self._array.path(shard)} ended while it was read; restore it")
            target, place = target[n:], place + n


def read_ahead(arrays: Iterable[RowArray], plan: PoolPlan) -> None:
    """Announce the rows of a pool in arrays over the pinned shards."""
    if not _announces():
        return
    for array in arrays:
        row_bytes = array.layout.row_bytes
        for shard, runs in groupby(plan.runs(MERGED_GAP // row_bytes).tolist(), key=itemgetter(0)):
            descriptor = array.open(shard)
            try:
                for _, first, end in runs:
                    os.posix_fadvise(descriptor, first * row_bytes, (end - first) * row_bytes, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


def _announces() -> bool:
    value = os.environ.get(VARIABLE) or "1"
    if value not in ("0", "1"):
        raise SelectionError(f"{VARIABLE}={value!r}: expected 0 or 1; unset it for the default")
    return value == "1" and hasattr(os, "posix_fadvise")


def _read_at(descriptor: int, target: memoryview, place: int) -> int:
    """Read from a place of a file into `target`; how many bytes came, 0 at its end."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [target], place)
    os.lseek(descriptor, place, os.SEEK_SET)
    data = os.read(descriptor, len(target))
    target[: len(data)] = data
    return len(data)
