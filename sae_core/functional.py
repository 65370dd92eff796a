"""Activations as pure functions: which latents of which rows stay, and straight-through steps.

Shapes: N rows, F = d_sae latents, nnz entries of a pattern.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from sae_core.codes import Pattern

# Above this share of stored entries, dense products beat the sparse ones (2 CPU cores, d 384, F 12288).
MAX_SPARSE_DENSITY = 0.08


def topk_pattern(pre_acts: Tensor, k: int) -> Pattern:
    """Keep the k largest pre-activations of each row of (N, F); (arXiv 2406.04093)."""
    return Pattern.fixed_k(pre_acts.topk(k, dim=-1, sorted=False).indices, pre_acts.shape[1])


def batch_topk_pattern(pre_acts: Tensor, k: int) -> Pattern:
    """Keep the N*k largest positive pre-activations of the whole (N, F) batch; (arXiv 2412.06410).

    Exactly min(N*k, positives) entries stay; among equal values the lowest (row, latent) wins. Instead of a
    selection over all N*F numbers, the c largest of each row are candidates; the answer is exact unless a row
    keeps all of its candidates, and then c doubles.
    """
    n_rows, d_sae = pre_acts.shape
    n_keep, width = n_rows * k, min(d_sae, 2 * k)
    while True:
        values, latents = pre_acts.topk(width, dim=-1, sorted=False)
        keep = _largest(values, n_keep) & (values > 0)
        if width == d_sae or not bool(keep.all(dim=1).any()):
            break
        width = min(d_sae, 2 * width)
    threshold = values[keep].min() if bool(keep.any()) else None
    if threshold is not None and int((values == threshold).sum()) > int((values[keep] == threshold).sum()):
        return _resolve_ties(pre_acts, threshold, n_keep)
    rows, slots = keep.nonzero(as_tuple=True)
    return Pattern.of_rows(rows, latents[rows, slots], n_rows, d_sae)


def _largest(values: Tensor, n_keep: int) -> Tensor:
    """Mask of the n_keep largest entries of values (N, C), without preference among ties."""
    flat = values.reshape(-1)
    if n_keep >= flat.numel():
        return torch.ones_like(values, dtype=torch.bool)
    keep = torch.zeros_like(flat, dtype=torch.bool)
    keep[flat.topk(n_keep, sorted=False).indices] = True
    return keep.view_as(values)


def _resolve_ties(pre_acts: Tensor, threshold: Tensor, n_keep: int) -> Pattern:
    """Everything above the threshold, and of what equals it the lowest (row, latent) until n_keep are kept."""
    above = pre_acts > threshold
    tied = (pre_acts == threshold).nonzero()
    spare = n_keep - int(above.sum())
    above[tied[:spare, 0], tied[:spare, 1]] = True
    return Pattern.of_mask(above)


def support_pattern(support: Tensor) -> Pattern:
    """Pattern of a (N, F) mask; the full pattern when the mask is too dense for sparse products to pay."""
    n_rows, d_sae = support.shape
    if int(support.sum()) > MAX_SPARSE_DENSITY * support.numel():
        return Pattern(n_rows, d_sae)
    return Pattern.of_mask(support)


class _JumpReLU(Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(p, threshold)
        ctx.bandwidth = bandwidth
        return p * (p > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        p, threshold = ctx.saved_tensors
        inside = ((p - threshold).abs() < ctx.bandwidth / 2).to(p.dtype)
        grad_threshold = -(threshold / ctx.bandwidth) * inside * grad
        return grad * (p > threshold), _fit(grad_threshold, threshold), None


class _Step(Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
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


def jumprelu(p: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """p * H(p - threshold), with dz/dthreshold = -(threshold/bandwidth) K((p - threshold)/bandwidth).

    K is the rectangle of width 1 (arXiv 2407.14435). p and threshold per entry (nnz,), or (N, F) and (F,).
    """
    return _JumpReLU.apply(p, threshold, bandwidth)  # type: ignore[no-any-return, no-untyped-call]


def step(p: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """H(p - threshold), with dH/dthreshold = -(1/bandwidth) K((p - threshold)/bandwidth) and dH/dp = 0."""
    return _Step.apply(p, threshold, bandwidth)  # type: ignore[no-any-return, no-untyped-call]


def geometric_median(rows: Tensor, n_iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """Return the point (D,) with the least summed distance to rows (N, D), by Weiszfeld's iteration in float64."""
    rows = rows.double()
    median = rows.mean(0)
    for _ in range(n_iterations):
        weights = 1.0 / (rows - median).norm(dim=1).clamp_min(1e-12)
        updated = (weights[:, None] * rows).sum(0) / weights.sum()
        moved = (updated - median).norm()
        median = updated
        if moved <= tolerance * median.norm().clamp_min(1e-12):
            break
    return median
