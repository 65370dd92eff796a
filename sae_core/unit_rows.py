"""Keeping the rows of a matrix at unit norm: one pass over blocks that stay in the processor's cache.

Shapes: F rows of width D.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ENTRIES = 2**18  # 1 MiB of float32


def remove_parallel(grad: Tensor, rows: Tensor) -> None:
    """Remove from each row of grad (F, D), in place, its component along the same row of unit-norm rows (F, D)."""
    for g, row in zip(_blocks(grad), _blocks(rows), strict=True):
        g.addcmul_(torch.linalg.vecdot(g, row)[:, None], row, value=-1)


def to_unit_norm(rows: Tensor) -> None:
    """Scale rows (F, D) to unit norm, in place. Rows of zeros stay."""
    for row in _blocks(rows):
        row.div_(torch.linalg.vector_norm(row, dim=1, keepdim=True).clamp_min_(1e-12))


def _blocks(matrix: Tensor) -> Iterator[Tensor]:
    """Some rows at a time on a CPU; on other devices one launch over all of them is faster."""
    n_rows, width = matrix.shape
    size = max(1, BLOCK_ENTRIES // max(1, width)) if matrix.device.type == "cpu" else max(1, n_rows)
    for start in range(0, n_rows, size):
        yield matrix[start : start + size]
