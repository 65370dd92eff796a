"""Unit-norm rows as Triton kernels: each matrix is read, and written, once.

Shapes: F rows of D entries, each the work of one program. Rows are contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 2**14  # entries of a row that a program holds


@triton.jit
def remove_parallel_rows(grad, rows, width, BLOCK: tl.constexpr):
    """grad[f] -= (grad[f] . rows[f]) rows[f]."""
    f = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(grad + f * width + at, mask=inside, other=0.0).to(tl.float32)
    row = tl.load(rows + f * width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad + f * width + at, g - tl.sum(g * row, axis=0) * row, mask=inside)


@triton.jit
def scale_to_unit_rows(rows, width, BLOCK: tl.constexpr):
    """rows[f] /= max(|rows[f]|, 1e-12)."""
    f = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    row = tl.load(rows + f * width + at, mask=inside, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(row * row, axis=0))
    tl.store(rows + f * width + at, row / tl.maximum(norm, 1e-12), mask=inside)


def takes(*matrices: Tensor) -> bool:
    """Whether these kernels can process the matrices."""
    return all(m.is_contiguous() and m.dtype == torch.float32 and 0 < m.shape[1] <= MAX_WIDTH for m in matrices)


def remove_parallel(grad: Tensor, rows: Tensor) -> None:
    """`functional.remove_parallel` in one pass."""
    n_rows, width = grad.shape
    with torch.cuda.device_of(grad):
        remove_parallel_rows[(n_rows,)](grad, rows, width, **_sizes(width))


def to_unit_norm(rows: Tensor) -> None:
    """`functional.to_unit_norm` in one pass."""
    n_rows, width = rows.shape
    with torch.cuda.device_of(rows):
        scale_to_unit_rows[(n_rows,)](rows, width, **_sizes(width))


def _sizes(width: int) -> dict[str, int]:
    block = max(16, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 256))}
