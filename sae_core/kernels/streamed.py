"""The entries of a product that exceed a bound, found while each part is still in the processor's cache.

Shapes: N rows, D width, F latents, nnz entries found.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MIN_ENTRIES = 2**22  # of (N, F): below, the product is small enough to be kept
CHUNK_ENTRIES = 2**22  # 16 MiB of float32


class Entries(NamedTuple):
    """Entries of a (N, F) matrix, row by row."""

    rows: Tensor  # (nnz,) int64, ascending
    latents: Tensor  # (nnz,) int64
    values: Tensor  # (nnz,)


def pays(h: Tensor, d_sae: int) -> bool:
    """Whether to compute rows h (N, D) in parts. Not on a GPU, which would wait for each part's number of entries."""
    return h.device.type == "cpu" and h.dtype == torch.float32 and h.shape[0] * d_sae >= MIN_ENTRIES


@torch.no_grad()
def product_above(h: Tensor, W: Tensor, bias: Tensor, bound: Tensor | float, max_share: float) -> Entries | None:
    """Entries of h @ W + bias > bound for h (N, D), W (D, F), bias (F,), bound () or (F,).

    None as soon as they are more than `max_share` of those looked at.
    """
    n_rows, d_sae = h.shape[0], W.shape[1]
    n_chunks = max(1, round(n_rows * d_sae / CHUNK_ENTRIES))
    size = -(-n_rows // n_chunks)
    buffer = h.new_empty(size, d_sae)
    found: list[Entries] = []
    n_found = 0
    for start in range(0, n_rows, size):
        rows = h[start : start + size]
        part = torch.mm(rows, W, out=buffer[: len(rows)]).add_(bias)
        row, latent = (part > bound).nonzero(as_tuple=True)
        n_found += row.numel()
        if n_found > max_share * (start + len(rows)) * d_sae:
            return None
        found.append(Entries(row + start, latent.contiguous(), part[row, latent]))
    return Entries(*(torch.cat(parts) for parts in zip(*found, strict=True)))
