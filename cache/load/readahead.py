"""Ask the kernel to read a pool's blocks from the disk, in order, before rows are taken from them at random.

Rows that are in memory are announced too: to look for them first (RWF_NOWAIT) would miss the holes of sparse files.
Switch: the environment variable GRANARY_READ_AHEAD, 1 (default) or 0.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sae_granary.cache.errors import SelectionError
from sae_granary.cache.load.order import PoolPlan, ShardPart

VARIABLE = "GRANARY_READ_AHEAD"
MERGED_GAP = 128 * 2**10  # smaller gaps between two blocks are read too: a disk reads so many bytes at once


def read_ahead(files: Sequence[Sequence[tuple[Path, int]]], plan: PoolPlan) -> None:
    """Announce the rows of a pool; `files` are the (path, bytes per row) of each pinned shard, for each hook point."""
    if not (_is_on() and hasattr(os, "posix_fadvise")):
        return
    for shards in files:
        for part in plan.parts:
            path, row_bytes = shards[part.shard]
            descriptor = os.open(path, os.O_RDONLY)
            try:
                _announce(descriptor, part, row_bytes)
            finally:
                os.close(descriptor)


def _is_on() -> bool:
    value = os.environ.get(VARIABLE) or "1"
    if value not in ("0", "1"):
        raise SelectionError(f"{VARIABLE}={value!r}: expected 0 or 1; unset it for the default")
    return value == "1"


def _announce(descriptor: int, part: ShardPart, row_bytes: int) -> None:
    block_bytes = part.block_rows * row_bytes
    ends = np.flatnonzero(np.diff(part.blocks) > 1 + MERGED_GAP // block_bytes)
    firsts = part.blocks[np.concatenate([[0], ends + 1])]
    lasts = part.blocks[np.concatenate([ends, [len(part.blocks) - 1]])]
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        n_bytes = (last - first + 1) * block_bytes
        os.posix_fadvise(descriptor, first * block_bytes, n_bytes, os.POSIX_FADV_WILLNEED)
