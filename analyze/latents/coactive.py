"""Latents that are active on the same rows, over a sample of rows.

Shapes: F = d_sae latents, n sampled rows, nnz entries of them, M latents kept for each.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

MAX_ROWS = 2**14
MAX_PAIRS = 2**29  # of latents active on the same row, summed over the rows: a dense SAE gets fewer rows
BLOCK_COUNTS, BLOCK_PAIRS = 2**21, 2**22  # held at once

I64: TypeAlias = NDArray[np.int64]


def spread(n_rows: int, n: int) -> I64:
    """n of n_rows numbers, evenly spaced from 0; all of them if there are fewer."""
    n = min(n, n_rows)
    return np.arange(n, dtype=np.int64) * n_rows // max(n, 1)


def sample_size(n_pairs: float, n_rows: int) -> int:
    """Number of rows to count, from the sum over rows of the squared number of active latents."""
    return min(MAX_ROWS, n_rows, max(1, int(MAX_PAIRS * n_rows / max(n_pairs, 1.0))))


def coactive(row: I64, latent: I64, d_sae: int, n: int) -> tuple[I64, NDArray[np.float32]]:
    """The n latents most often active together with each, and their Jaccard index, from the entries of sampled rows.

    `row` and `latent` (nnz,) are sorted by row, and a row holds a latent once. The Jaccard index of two latents is the
    number of rows on which both are active over the number on which at least one is. Returns (F, n) latents, -1 where
    fewer are ever active with it, and (F, n) indices. Of equal ones the lower latent comes first.
    Memory: 40 bytes for each of 2**21 counts, 32 for each of 2**22 pairs, whatever the number of latents.
    """
    n = min(n, d_sae - 1)
    latents, scores = np.full((d_sae, n), -1, np.int64), np.zeros((d_sae, n), np.float32)
    fired = np.bincount(latent, minlength=d_sae)
    n_active = np.bincount(row)
    ends = np.cumsum(n_active)
    by_latent = np.argsort(latent, kind="stable")
    ordered, first = latent[by_latent], np.concatenate([[0], np.cumsum(fired)])
    pairs = np.concatenate([[0], np.cumsum(n_active[row[by_latent]])])[first]  # of the latents before each
    stop = 0
    while stop < d_sae:
        start = stop
        stop = int(np.searchsorted(pairs, pairs[start] + BLOCK_PAIRS, side="right")) - 1
        stop = min(max(stop, start + 1), start + max(1, BLOCK_COUNTS // d_sae), d_sae)
        part = slice(int(first[start]), int(first[stop]))
        rows = row[by_latent[part]]
        width = n_active[rows]
        others = latent[np.repeat(ends[rows] - np.cumsum(width), width) + np.arange(width.sum())]
        keys = np.repeat((ordered[part] - start) * d_sae, width) + others
        both = np.bincount(keys, minlength=(stop - start) * d_sae).reshape(stop - start, d_sae)
        both[np.arange(stop - start), np.arange(start, stop)] = 0
        index = both / np.maximum(fired[start:stop, None] + fired[None] - both, 1)
        ranked = torch.from_numpy(index - np.arange(d_sae) * 2.0**-48)  # different indices differ by 2**-30 or more
        found = ranked.topk(n, dim=1).indices.numpy()
        values = np.take_along_axis(index, found, 1)
        latents[start:stop] = np.where(values > 0, found, -1)
        scores[start:stop] = values
    return latents, scores
