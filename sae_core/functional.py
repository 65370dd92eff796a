"""Activation functions: top-k patterns, JumpReLU and step with straight-through gradients; unit-norm rows.

Shapes: N rows, D width, F = d_sae latents, nnz entries of a pattern.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from sae_granary.common.device import float64
from sae_granary.sae_core.codes import Codes, Pattern
from sae_granary.sae_core.kernels import kth_largest, row_topk, takes_triton

# Above this share of stored entries, dense products beat the sparse ones (2 CPU cores, d 384, F 12288).
MAX_SPARSE_DENSITY = 0.08
MAX_MEDIAN_ROWS = 2**15  # that the geometric median looks at
MEDIAN_ITERATIONS, MEDIAN_TOLERANCE = 100, 1e-5  # at most; of a step, relative to the median's norm
BLOCK_ENTRIES = 2**18  # of a matrix at a time, 1 MiB of float32: what stays in the processor's cache
BLOCK_COLUMNS = 64  # of a sample in float64 at a time: as a whole it needs new memory, which takes longer than its sums


def topk_pattern(pre_acts: Tensor, k: int) -> Pattern:
    """Keep the k largest pre-activations of each row of (N, F); (arXiv 2406.04093)."""
    return Pattern.fixed_k(row_topk(pre_acts, k), pre_acts.shape[1])


def topk_entries(values: Tensor, pattern: Pattern, k: int) -> Tensor:
    """Positions (N, k) of the k largest entries of each row, whose every row has k entries or more."""
    _, indptr = pattern.entries
    width = int(indptr.diff().max())
    slots = torch.arange(values.numel(), device=values.device) + pattern.row_of * width - indptr[pattern.row_of]
    padded = values.new_full((pattern.n_rows, width), -torch.inf)
    padded.view(-1)[slots] = values
    return indptr[:-1, None] + padded.topk(k, dim=1, sorted=False).indices


def sampled_bound(sample: Tensor, share: float) -> float:
    """A number that about `share` of sampled entries (n, F) exceed; 0 once that leaves no positive bound."""
    flat = sample.reshape(-1)
    n_above = int(share * flat.numel()) + 1
    if n_above >= flat.numel():
        return 0.0
    return max(0.0, float(flat.topk(n_above, sorted=False).values.min()))


def largest(codes: Codes, n_keep: int) -> Tensor:
    """Mask (nnz,) of the n_keep largest values; among equal ones the lowest (row, latent) wins."""
    values = codes.values
    if values.numel() <= n_keep:
        return torch.ones_like(values, dtype=torch.bool)
    smallest = kth_largest(values, n_keep)
    keep = values > smallest
    tied = (values == smallest).nonzero().squeeze(1)
    position = codes.pattern.row_of[tied] * codes.shape[1] + codes.indices[tied]
    keep[tied[position.argsort()][: n_keep - int(keep.sum())]] = True
    return keep


def support_pattern(support: Tensor) -> Pattern:
    """Pattern of a (N, F) mask; the full pattern when the mask is too dense for sparse products to pay."""
    n_rows, d_sae = support.shape
    if int(support.count_nonzero()) > MAX_SPARSE_DENSITY * support.numel():
        return Pattern(n_rows, d_sae)
    return Pattern.of_mask(support)


class _JumpReLU(Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, threshold: Tensor, bandwidth: float | Tensor, to_input: bool) -> Tensor:
        ctx.save_for_backward(p, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return p * (p > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        p, threshold = ctx.saved_tensors
        inside = ((p - threshold).abs() < ctx.bandwidth / 2).to(p.dtype)
        grad_threshold = -(threshold / ctx.bandwidth) * inside * grad
        grad_p = grad * (p > threshold)
        return grad_p - grad_threshold if ctx.to_input else grad_p, _fit(grad_threshold, threshold), None, None


class _Step(Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, threshold: Tensor, bandwidth: float | Tensor) -> Tensor:
        ctx.save_for_backward(p, threshold)
        ctx.bandwidth = bandwidth
        return (p > threshold).to(p.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        p, threshold = ctx.saved_tensors
        inside = ((p - threshold).abs() < ctx.bandwidth / 2).to(p.dtype)
        # The true derivative in p is zero almost everywhere and stays zero: dH/dp = 0.
        return None, _fit(-(1.0 / ctx.bandwidth) * inside * grad, threshold), None


def _fit(grad: Tensor, like: Tensor) -> Tensor:
    """Undo the broadcast of one threshold per latent over (N, F)."""
    return grad.sum(0) if like.dim() < grad.dim() else grad


def jumprelu(p: Tensor, threshold: Tensor, bandwidth: float | Tensor, *, to_input: bool = False) -> Tensor:
    """p * H(p - threshold), with dz/dthreshold = -(threshold/bandwidth) K((p - threshold)/bandwidth).

    K is the rectangle of width 1 (arXiv 2407.14435). p and threshold per entry (nnz,), or (N, F) and (F,); a bandwidth
    that is a tensor is shaped as the threshold. With `to_input`, dz/dp is H plus the negative of dz/dthreshold.
    """
    return _JumpReLU.apply(p, threshold, bandwidth, to_input)  # type: ignore[no-any-return, no-untyped-call]


def step(p: Tensor, threshold: Tensor, bandwidth: float | Tensor) -> Tensor:
    """H(p - threshold), with dH/dthreshold = -(1/bandwidth) K((p - threshold)/bandwidth) and dH/dp = 0."""
    return _Step.apply(p, threshold, bandwidth)  # type: ignore[no-any-return, no-untyped-call]


def annealed_sparsity(activity: Tensor, exponent: float) -> Tensor:
    """Sum of activity ** exponent, rescaled (without gradient) to the plain sum; (p-annealing, arXiv 2408.00113).

    activity holds nonnegative entries. The paper adapts the coefficient so that the penalty keeps its size while the
    exponent falls; rescaling each batch does the same without a state.
    """
    plain = activity.sum()
    if exponent == 1.0:
        return plain
    powered = activity.clamp_min(1e-6).pow(exponent)
    powered = torch.where(activity > 0, powered, 0.0).sum()
    return powered * (plain / powered.clamp_min(1e-30)).detach()


def typical_row(rows: Tensor, how: str) -> Tensor:
    """Return a point (D,) central to rows (N, D), by one of B_DEC_INITS."""
    if how == "geometric_median":
        return geometric_median(rows[:MAX_MEDIAN_ROWS])
    return column_means(rows) if how == "mean" else torch.zeros_like(rows[0])


def column_means(rows: Tensor) -> Tensor:
    """Mean (D,) of rows (N, D), in float64."""
    return torch.cat([float64(columns).mean(0) for columns in torch.split(rows, BLOCK_COLUMNS, dim=1)])


def geometric_median(rows: Tensor) -> Tensor:
    """Return the point (D,) with the least summed distance to rows (N, D), by Weiszfeld's iteration in float64."""
    rows = float64(rows)
    median = rows.mean(0)
    for _ in range(MEDIAN_ITERATIONS):
        distances = torch.cat([(block - median).norm(dim=1) for block in blocks(rows)])
        weights = 1.0 / distances.clamp_min(1e-12)
        weighted = [(weights[:, None] * columns).sum(0) for columns in torch.split(rows, BLOCK_COLUMNS, dim=1)]
        updated = torch.cat(weighted) / weights.sum()
        moved = (updated - median).norm()
        median = updated
        if moved <= MEDIAN_TOLERANCE * median.norm().clamp_min(1e-12):
            break
    return median


def remove_parallel(grad: Tensor, rows: Tensor) -> None:
    """Remove from each row of grad (F, D), in place, its component along the same row of unit-norm rows (F, D)."""
    if _takes_row_kernels(grad, rows):
        from sae_granary.sae_core.kernels import triton_rows

        triton_rows.remove_parallel(grad, rows)
        return
    for g, row in zip(blocks(grad), blocks(rows), strict=True):
        g.addcmul_(torch.linalg.vecdot(g, row)[:, None], row, value=-1)


def to_unit_norm(rows: Tensor) -> None:
    """Scale rows (F, D) to unit norm, in place. Rows of zeros stay."""
    if _takes_row_kernels(rows):
        from sae_granary.sae_core.kernels import triton_rows

        triton_rows.to_unit_norm(rows)
        return
    for row in blocks(rows):
        row.div_(torch.linalg.vector_norm(row, dim=1, keepdim=True).clamp_min_(1e-12))


def _takes_row_kernels(*matrices: Tensor) -> bool:
    if not takes_triton(matrices[0]):
        return False
    from sae_granary.sae_core.kernels import triton_rows

    return triton_rows.takes(*matrices)


def blocks(matrix: Tensor) -> Iterator[Tensor]:
    """Blocks of rows of a matrix (N, D) on a CPU, all rows at once on other devices, where one launch is faster."""
    n_rows, width = matrix.shape
    size = max(1, BLOCK_ENTRIES // max(1, width)) if matrix.device.type == "cpu" else max(1, n_rows)
    for start in range(0, n_rows, size):
        yield matrix[start : start + size]
