"""Rows of weights and gradients as Triton kernels: each matrix is read, and written, once.

Shapes: F rows of D entries, each the work of one program. Rows are contiguous.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 2**14  # entries of a row that a program holds
PER_WARP = 256  # entries of a row for each warp
MAX_UPDATED_WIDTH = 2**13  # of a row with its gradient and moments


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


@triton.jit
def square_rows(grad, rows, squares, width, BLOCK: tl.constexpr, PROJECT: tl.constexpr):
    """squares[f] = |grad[f]|^2, with PROJECT of what `remove_parallel_rows` leaves of it; float64."""
    f = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(grad + f * width + at, mask=inside, other=0.0)
    if PROJECT:
        row = tl.load(rows + f * width + at, mask=inside, other=0.0)
        g -= tl.sum(g * row, axis=0) * row
    wide = g.to(tl.float64)
    tl.store(squares + f, tl.sum(wide * wide, axis=0))


@triton.jit
def add_rows(grad, latents, more, rows, grown, width, BLOCK: tl.constexpr, PROJECT: tl.constexpr):
    """grad[f] += more[a] for latent f = latents[a]; grown[a] is what that adds to |grad[f]|^2 (see `square_rows`)."""
    a = tl.program_id(0).to(tl.int64)
    f = tl.load(latents + a).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(grad + f * width + at, mask=inside, other=0.0)
    m = tl.load(more + a * width + at, mask=inside, other=0.0)
    tl.store(grad + f * width + at, g + m, mask=inside)
    if PROJECT:
        row = tl.load(rows + f * width + at, mask=inside, other=0.0)
        g -= tl.sum(g * row, axis=0) * row
        m -= tl.sum(m * row, axis=0) * row
    before, added = g.to(tl.float64), m.to(tl.float64)
    tl.store(grown + a, tl.sum(added * (2 * before + added), axis=0))  # |g + m|^2 - |g|^2


@triton.jit(do_not_specialize=["scale", "step_size", "root", "eps", "new_mean", "beta2", "new_square", "decay"])
def update_rows(
    rows, grad, mean, square, width, scale, step_size, root, eps, new_mean, beta2, new_square, decay,
    BLOCK: tl.constexpr, UNIT: tl.constexpr, DECOUPLED: tl.constexpr,
):  # fmt: skip
    """Adam's step of a row, with UNIT on the gradient without its part along the row, which gets unit norm again.

    Divisions and roots are rounded as on a CPU.
    """
    f = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    place = f * width + at
    g = tl.load(grad + place, mask=inside, other=0.0)
    row = tl.load(rows + place, mask=inside, other=0.0)
    m = tl.load(mean + place, mask=inside, other=0.0)
    v = tl.load(square + place, mask=inside, other=0.0)
    if UNIT:
        g -= tl.sum(g * row, axis=0) * row
    g *= scale
    if DECOUPLED:
        row -= decay * row
    else:
        g += decay * row
    m += new_mean * (g - m)
    v = beta2 * v + new_square * g * g
    row -= step_size * tl.math.div_rn(m, tl.math.div_rn(tl.math.sqrt_rn(v), root) + eps)
    if UNIT:
        norm = tl.math.sqrt_rn(tl.sum(row * row, axis=0))
        row = tl.math.div_rn(row, tl.broadcast_to(tl.maximum(norm, 1e-12), (BLOCK,)))
    tl.store(rows + place, row, mask=inside)
    tl.store(mean + place, m, mask=inside)
    tl.store(square + place, v, mask=inside)


class AdamStep(NamedTuple):
    """The numbers of one step of Adam."""

    scale: float  # of the gradient: what a clip leaves of it
    step_size: float  # learning rate / (1 - beta1^step)
    root: float  # sqrt(1 - beta2^step)
    eps: float
    beta1: float
    beta2: float
    decay: float  # weight decay, with `decoupled` times the learning rate
    decoupled: bool  # the decay shrinks the weights (AdamW) and is no part of the gradient (Adam)


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


def squared_norms(grad: Tensor, rows: Tensor | None) -> Tensor:
    """(F,) float64 |grad[f]|^2 of grad (F, D); if unit-norm rows (F, D) are given, after `remove_parallel` of them."""
    n_rows, width = grad.shape
    squares = torch.empty(n_rows, dtype=torch.float64, device=grad.device)
    with torch.cuda.device_of(grad):
        square_rows[(n_rows,)](
            grad, grad if rows is None else rows, squares, width, PROJECT=rows is not None, **_sizes(width)
        )
    return squares


def add_to_rows(grad: Tensor, latents: Tensor, more: Tensor, rows: Tensor | None) -> Tensor:
    """Add more (A, D) to some distinct rows (A,) of grad (F, D); return by how much |grad[f]|^2 grows: (A,) float64.

    If unit-norm rows (F, D) are given, that of what `remove_parallel` leaves.
    """
    n_rows, width = more.shape
    grown = torch.empty(n_rows, dtype=torch.float64, device=grad.device)
    with torch.cuda.device_of(grad):
        add_rows[(n_rows,)](
            grad, latents, more, grad if rows is None else rows, grown, width, PROJECT=rows is not None, **_sizes(width)
        )
    return grown


def adam_step(rows: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: AdamStep, *, unit: bool) -> None:
    """Adam's step of rows (F, D) in place, with the moments of its gradient, in one pass over the four matrices.

    With `unit`, `remove_parallel` of the gradient comes first and `to_unit_norm` of the rows last; `grad` is only read.
    """
    n_rows, width = rows.shape
    with torch.cuda.device_of(rows):
        update_rows[(n_rows,)](
            rows, grad, mean, square, width, step.scale, step.step_size, step.root, step.eps,
            1 - step.beta1, step.beta2, 1 - step.beta2, step.decay,
            UNIT=unit, DECOUPLED=step.decoupled, **_sizes(width),
        )  # fmt: skip


def _sizes(width: int) -> dict[str, int]:
    block = max(16, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // PER_WARP))}
