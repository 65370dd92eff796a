"""The tokens around examples, and a latent's activation on each, for many examples at once.

Shapes: X examples, W = 21 tokens of a window, R distinct rows of all windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sae_granary.analyze.encoding.codes import StoredCodes
from sae_granary.cache.read.reader import Cache
from sae_granary.common.rows import FLAG_SPECIAL

SIDE = 10  # tokens shown on either side
WIDTH = 2 * SIDE + 1
REACH = 2 * SIDE + 16  # rows looked at on either side: each context adds special tokens
BLOCK = 4096  # examples at once

I64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows over a stream of rows: those of all windows, ascending, each once."""

    rows: I64  # (R,) of the cache
    start: NDArray[np.uint32]  # (X,) where each window starts in `rows`
    before: NDArray[np.uint8]  # (X,) tokens before the example's own
    length: NDArray[np.uint8]  # (X,) tokens of the window; 0 where there is no example

    def places(self, part: slice) -> tuple[I64, NDArray[np.bool_]]:
        """Places (n, W) in the stream of some windows, and which of them belong to the window."""
        offsets = np.arange(WIDTH)
        inside = offsets < self.length[part, None]
        return np.where(inside, self.start[part, None].astype(np.int64) + offsets, 0), inside


def find_windows(cache: Cache, examples: I64) -> Windows:
    """The windows around rows (X,) of a cache, -1 for none: up to 10 tokens of the same document on either side.

    Special tokens are left out, as in `Cache.context`.
    """
    first = np.zeros(len(examples), np.int64)
    before, length = np.zeros(len(examples), np.uint8), np.zeros(len(examples), np.uint8)
    needed = np.zeros(len(cache), np.bool_)
    for begin in range(0, len(examples), BLOCK):
        part = slice(begin, begin + BLOCK)
        rows, inside = _around(cache, examples[part])
        needed[rows[inside]] = True
        first[part] = np.where(inside, rows, len(cache)).min(1)
        before[part], length[part] = inside[:, :REACH].sum(1), inside.sum(1)
    stream = np.flatnonzero(needed)
    return Windows(stream, np.searchsorted(stream, first).astype(np.uint32), before, length)


def _around(cache: Cache, examples: I64) -> tuple[I64, NDArray[np.bool_]]:
    """Rows (n, 2 REACH + 1) around each example, and which of them belong to its window."""
    rows = examples[:, None] + np.arange(-REACH, REACH + 1)
    there = (rows >= 0) & (rows < len(cache)) & (examples >= 0)[:, None]
    rows = np.where(there, rows, 0)
    document = cache.column("doc_id")[rows.ravel()].reshape(rows.shape)
    special = (cache.column("flags")[rows.ravel()].reshape(rows.shape) & FLAG_SPECIAL) != 0
    inside = there & (document == document[:, REACH, None]) & ~special
    inside[:, REACH] = examples >= 0
    left = np.cumsum(inside[:, REACH - 1 :: -1], axis=1)[:, ::-1]
    right = np.cumsum(inside[:, REACH + 1 :], axis=1)
    inside[:, :REACH] &= left <= SIDE
    inside[:, REACH + 1 :] &= right <= SIDE
    return rows, inside


def activations_at(codes: StoredCodes, rows: I64, latents: I64) -> NDArray[np.float32]:
    """The activation of a latent at a row, for pairs (P,); 0 where it is inactive. Searches within each row."""
    low, high = codes.indptr[rows].astype(np.int64), codes.indptr[rows + 1].astype(np.int64)
    last = max(len(codes.indices) - 1, 0)
    end = high.copy()
    while (low < high).any():
        middle = (low + high) // 2
        smaller = codes.indices[np.minimum(middle, last)] < latents
        searching = low < high
        low = np.where(searching & smaller, middle + 1, low)
        high = np.where(searching & ~smaller, middle, high)
    if not len(codes.indices):
        return np.zeros(len(rows), np.float32)
    place = np.minimum(low, last)
    found = (low < end) & (codes.indices[place] == latents)
    return np.where(found, codes.values[place], np.float32(0))
