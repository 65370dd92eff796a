"""The sums that statistics are made of, on the device: bit for bit those of `cache.format.stats.block_sums`.

numpy adds the rows of a block one after another, and the values of a row pairwise: in eight running sums over at most
128 values, longer rows in halves. Here the same float64 additions are made in the same order, so that a cache has the
same bytes wherever its sums were made. The pairwise order is that of `pairwise_sum` in numpy's
`_core/src/umath/loops_utils.h.src`.

Shapes: N rows, D = d_in, C blocks of B rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from sae_granary.common.rows import BlockSums

if TYPE_CHECKING:
    import torch

_SLICE_VALUES = 1 << 24  # that are in float64 at once: 128 MiB, up to three times
_PAIRWISE, _LANES = 128, 8


class SumsOnDevice:
    """Sums of blocks of B rows that begin at some rows of a tensor on the device."""

    def __init__(self, x_ND: torch.Tensor, firsts: range, block_rows: int) -> None:
        """Start the computation on the current stream; `firsts` are the first rows of consecutive blocks."""
        self._firsts = firsts
        self._parts = [tuple(_sums(x_CBD)) for x_CBD in _slices(x_ND, firsts, block_rows)]

    def to_host(self) -> Mapping[int, BlockSums]:
        """The sums by the first row of their block; waits for the current stream."""
        found: dict[int, BlockSums] = {}
        firsts = iter(self._firsts)
        for part in self._parts:
            for arrays in zip(*(tensor.cpu().numpy() for tensor in part), strict=True):
                found[next(firsts)] = BlockSums(*arrays)
        return found


def _slices(x_ND: torch.Tensor, firsts: range, block_rows: int) -> Iterator[torch.Tensor]:
    n_blocks = max(1, _SLICE_VALUES // (block_rows * x_ND.shape[1]))
    for start in range(0, len(firsts), n_blocks):
        blocks = firsts[start : start + n_blocks]
        rows_ND = x_ND[blocks[0] : blocks[-1] + block_rows]
        yield rows_ND.reshape(len(blocks), block_rows, x_ND.shape[1])


def _sums(x_CBD: torch.Tensor) -> Iterator[torch.Tensor]:
    """Sums of dimensions (C, D), of their squares (C, D), and of the squares of rows (C, B), each in numpy's order."""
    import torch

    exact_CBD = x_CBD.to(torch.float64)
    yield exact_CBD.cumsum(1)[:, -1].clone()  # one row after another; `sum` adds in another order
    exact_CBD.square_()
    yield exact_CBD.cumsum(1)[:, -1].clone()
    yield pairwise_sum(exact_CBD)


def pairwise_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension in the order in which numpy adds contiguous float64 values."""
    n = x.shape[-1]
    if n <= _PAIRWISE:
        return _short_sum(x)
    half = n // 2
    half -= half % _LANES
    if 2 * half == n:  # both halves at once
        halves = pairwise_sum(x.reshape(*x.shape[:-1], 2, half))
        return halves[..., 0] + halves[..., 1]
    return pairwise_sum(x[..., :half]) + pairwise_sum(x[..., half:])


def _short_sum(x: torch.Tensor) -> torch.Tensor:
    n = x.shape[-1]
    if n < _LANES:
        return _one_by_one(x[..., 0], x, 1)
    n_whole = n - n % _LANES
    lanes = x[..., :n_whole].reshape(*x.shape[:-1], n_whole // _LANES, _LANES)
    total = lanes[..., 0, :].clone()
    for i in range(1, n_whole // _LANES):
        total += lanes[..., i, :]
    while total.shape[-1] > 1:
        total = total[..., 0::2] + total[..., 1::2]
    return _one_by_one(total[..., 0], x, n_whole)


def _one_by_one(total: torch.Tensor, x: torch.Tensor, first: int) -> torch.Tensor:
    for i in range(first, x.shape[-1]):
        total = total + x[..., i]
    return total


def same_sums(a: BlockSums, b: BlockSums) -> bool:
    """Whether two sums have the same bits."""
    pairs = ((a.sum_D, b.sum_D), (a.square_D, b.square_D), (a.square_N, b.square_N))
    return all(np.array_equal(x.view(np.int64), y.view(np.int64)) for x, y in pairs)
