"""Statistics of every latent over the codes of a cache: pure functions of arrays, block after block.

Shapes: F = d_sae latents, N rows of a block, nnz entries of it, E examples kept per latent, B bins.
Activations count by magnitude where they are ordered (maximum, quantiles, examples): some variants have negative ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BINS_PER_OCTAVE, LOWEST, HIGHEST = 8, -12, 12  # of the histograms, from 2**-12 to 2**12
N_BINS = BINS_PER_OCTAVE * (HIGHEST - LOWEST)

F64: TypeAlias = NDArray[np.float64]
I64: TypeAlias = NDArray[np.int64]


def bin_of(magnitudes: NDArray[Any]) -> I64:
    """Histogram bin of each magnitude: 8 per octave; the first and last bins include everything beyond."""
    octaves = np.log2(magnitudes.astype(np.float64)) - LOWEST
    bins: I64 = np.clip(np.floor(octaves * BINS_PER_OCTAVE), 0, N_BINS - 1).astype(np.int64)
    return bins


@dataclass
class Examples:
    """The strongest entries of each latent, at most one per document: (k,) arrays, by latent, strongest first."""

    n_kept: int
    latent: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    value: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    row: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    document: I64 = field(default_factory=lambda: np.zeros(0, np.int64))

    def update(self, latent: I64, value: NDArray[np.float32], row: I64, document: I64, d_sae: int) -> None:
        """Add entries of later rows; among equal ones the earliest row stays."""
        weakest = np.zeros(d_sae)  # a latent with all its examples takes only stronger ones
        counts = np.bincount(self.latent, minlength=d_sae)
        full = np.flatnonzero(counts == self.n_kept)
        weakest[full] = np.abs(self.value[np.cumsum(counts)[full] - 1])
        new = np.abs(value) > weakest[latent]
        before: list[NDArray[Any]] = [self.latent, self.value, self.row, self.document]
        given: list[NDArray[Any]] = [latent, value, row, document]
        columns = [np.concatenate([old, more[new]]) for old, more in zip(before, given, strict=True)]
        columns = _first_of(columns, np.lexsort((columns[2], -np.abs(columns[1]), columns[3], columns[0])), (0, 3))
        order = np.lexsort((columns[2], -np.abs(columns[1]), columns[0]))
        columns = [column[order] for column in columns]
        starts = np.searchsorted(columns[0], columns[0])
        kept = np.arange(len(starts)) - starts < self.n_kept
        self.latent, self.value, self.row, self.document = (column[kept] for column in columns)

    def tables(self, d_sae: int) -> tuple[I64, NDArray[np.float32]]:
        """Rows (F, E), -1 where there are fewer, and their activations (F, E)."""
        rows = np.full((d_sae, self.n_kept), -1, np.int64)
        values = np.zeros((d_sae, self.n_kept), np.float32)
        place = np.arange(len(self.latent)) - np.searchsorted(self.latent, self.latent)
        rows[self.latent, place], values[self.latent, place] = self.row, self.value
        return rows, values


def _first_of(columns: list[NDArray[Any]], order: I64, keys: tuple[int, ...]) -> list[NDArray[Any]]:
    """First entry of each run of equal keys in sorted columns."""
    columns = [column[order] for column in columns]
    changes = np.zeros(len(order), dtype=np.bool_)
    for key in keys:
        changes[1:] |= columns[key][1:] != columns[key][:-1]
    changes[:1] = True
    return [column[changes] for column in columns]


@dataclass
class Accumulator:
    """Counts, sums, maxima, histograms and examples of every latent. Call `update` per block."""

    d_sae: int
    examples: Examples
    n_rows: int = 0

    def __post_init__(self) -> None:
        self.fired = np.zeros(self.d_sae, np.int64)
        self.sums = np.zeros(self.d_sae)
        self.largest = np.zeros(self.d_sae, np.float32)
        self.histogram = np.zeros(self.d_sae * N_BINS, np.int64)

    def update(self, latent: I64, value: NDArray[np.float32], row: I64, document: I64, n_rows: int) -> None:
        """Add the nonzero entries (nnz,) of n_rows rows; `row` and `document` are those of each entry."""
        self.n_rows += n_rows
        self.fired += np.bincount(latent, minlength=self.d_sae)
        self.sums += np.bincount(latent, weights=value, minlength=self.d_sae)
        np.maximum.at(self.largest, latent, np.abs(value))
        np.add.at(self.histogram, latent * N_BINS + bin_of(np.abs(value)), 1)
        self.examples.update(latent, value, row, document, self.d_sae)


def quantile(histogram: I64, q: float) -> F64:
    """(F,) magnitude below which a share q of the active rows lies, from histograms (F, B); 0 for a silent latent.

    The upper edge of the bin in which it lies: at most 9 % above the exact quantile inside 2**-12 to 2**12.
    """
    total = histogram.sum(1)
    place = (np.cumsum(histogram, axis=1) < np.ceil(q * total)[:, None]).sum(1)
    edges = 2.0 ** (LOWEST + (place + 1) / BINS_PER_OCTAVE)
    return np.where(total > 0, edges, 0.0)


@torch.no_grad()
def nearest_neighbors(W_dec: Tensor, n: int, chunk: int = 0) -> tuple[I64, NDArray[np.float32]]:
    """The n decoder rows of W_dec (F, D) with the largest cosine to each, itself left out: (F, n) latents, cosines.

    `chunk` rows are compared at once; 0: as many as have 2**24 cosines, 64 MB.
    """
    chunk = chunk or max(1, 2**24 // len(W_dec))
    rows = W_dec / W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
    n = min(n, len(rows) - 1)
    found = []
    for start in range(0, len(rows), chunk):
        cosines = rows[start : start + chunk] @ rows.t()
        own = torch.arange(len(cosines), device=rows.device)
        cosines[own, own + start] = -torch.inf
        found.append(cosines.topk(n, dim=1))
    latents = torch.cat([part.indices for part in found]).cpu().numpy()
    return latents, torch.cat([part.values for part in found]).float().cpu().numpy()
