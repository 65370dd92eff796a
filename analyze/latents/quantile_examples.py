"""One example of each latent in each of five equal intervals of its activation.

The intervals are those of SAEDashboard and Neuronpedia: [0, max] of the latent's activations in five equal parts, so
that the examples lead from its weakest to its strongest activations. Shapes: F = d_sae latents, Q = 5 intervals, nnz
entries of a block.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sae_granary.common.hashing import derive_key, hash64

N_INTERVALS = 5
_DOMAIN = 0x7175_616E  # "quan"
_ENTRY, _HOME = derive_key(_DOMAIN, 0), derive_key(_DOMAIN, 1)
_NONE = np.uint64(2**64 - 1)

I64: TypeAlias = NDArray[np.int64]


def interval_of(magnitudes: NDArray[Any], largest: NDArray[Any]) -> I64:
    """Interval of each magnitude (nnz,) between 0 and its latent's maximum (nnz,): 0 to Q - 1."""
    share = magnitudes.astype(np.float64) / np.maximum(largest.astype(np.float64), 1e-300)
    interval: I64 = np.minimum((share * N_INTERVALS).astype(np.int64), N_INTERVALS - 1)
    return interval


def priority(row: I64, document: I64, slot: I64) -> NDArray[np.uint64]:
    """Priority (nnz,) of entries for their slot, latent * Q + interval; the smallest wins.

    A keyed hash: a random but reproducible choice. Each latent also prefers each document for one interval, chosen by a
    hash, so that its examples come from different documents where possible.
    """
    latent, interval = np.divmod(slot, N_INTERVALS)
    home = hash64(document * 0x9E37_79B1 + latent, _HOME) % np.uint64(N_INTERVALS)
    guest = (home != interval.astype(np.uint64)).astype(np.uint64) << np.uint64(63)
    order: NDArray[np.uint64] = (hash64(row * 0x9E37_79B1 + slot, _ENTRY) >> np.uint64(1)) | guest
    return order


class QuantileExamples:
    """The chosen entry of each interval of each latent. Call `update` per block, in a pass with known maxima."""

    def __init__(self, largest: NDArray[np.float32]) -> None:
        self.largest = largest
        self.best = np.full(len(largest) * N_INTERVALS, _NONE, np.uint64)
        self.row = np.full(len(largest) * N_INTERVALS, -1, np.int64)
        self.value = np.zeros(len(largest) * N_INTERVALS, np.float32)

    def update(self, latent: I64, value: NDArray[np.float32], row: I64, document: I64) -> None:
        """Add entries (nnz,); `row` and `document` are those of each."""
        slot = latent * N_INTERVALS + interval_of(np.abs(value), self.largest[latent])
        order = priority(row, document, slot)
        better = np.flatnonzero(order < self.best[slot])
        better = better[np.argsort(order[better], kind="stable")[::-1]]  # of several for a slot the last one stays
        slot = slot[better]
        self.best[slot], self.row[slot], self.value[slot] = order[better], row[better], value[better]

    def tables(self) -> tuple[I64, NDArray[np.float32]]:
        """Rows (F, Q), -1 where an interval is empty, and their activations (F, Q)."""
        return self.row.reshape(-1, N_INTERVALS), self.value.reshape(-1, N_INTERVALS)
