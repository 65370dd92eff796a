"""Encoder and decoder products whose forward and backward compute only the stored entries of a pattern.

Shapes: N rows, D = d_in, F = d_sae, nnz entries. A full pattern uses ordinary matrix products.
W_enc (D, F) keeps the strides of its (F, D) transpose: each latent's encoder row is contiguous, and the gradient, which
is built latent by latent, needs no copy.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sae_granary.sae_core.codes import Codes, Pattern
from sae_granary.sae_core.kernels import bag_sum, sampled_dot, takes_triton
from sae_granary.sae_core.kernels.deferred import Deferred, RowGradient, current, host_waits
from sae_granary.sae_core.kernels.sparse import bag_sum_and_square, ones


@dataclass(frozen=True, eq=False)
class Centered:
    """Rows ready for the encoder: the decoder bias has been subtracted."""

    values: Tensor  # (N, D), differentiable in the rows and in the bias
    bias: Tensor | None = None  # (D,) what was subtracted, where the rows need no gradient: see `encode_at`


def center(rows: Tensor, bias: Tensor) -> Centered:
    """Return rows (N, D) - bias (D,), differentiable in both."""
    if rows.requires_grad:
        return Centered(rows + (-bias))  # the gradient of a sum is passed on as it is, that of a difference is copied
    return Centered(rows - bias, bias)


def encode_at(h: Centered, W_enc: Tensor, b_enc: Tensor, kept: Codes) -> Tensor:
    """Return the pre-activations h @ W_enc + b_enc at the entries of a pattern, differentiable in h, W_enc, b_enc.

    h (N, D), W_enc (D, F), b_enc (F,); `kept` holds the values there, already computed without gradients.
    Returns (nnz,), or (N, F) for a full pattern. For rows that need no gradient themselves none is built: that of
    the bias they were centered with is -W_enc times the gradient of b_enc.
    """
    rows = h.values if h.bias is None else h.values.detach()
    return _EncodeAt.apply(  # type: ignore[no-any-return, no-untyped-call]
        rows, W_enc, b_enc, kept.values, kept.pattern, h.bias
    )


def decode(codes: Codes, W_dec: Tensor) -> Tensor:
    """Return codes @ W_dec as (N, D), differentiable in the values of the codes and in W_dec (F, D)."""
    if codes.pattern.is_full:
        return codes.values @ W_dec
    return _Decode.apply(codes.values, W_dec, codes.pattern)  # type: ignore[no-any-return, no-untyped-call]


def add_silent(recon: Tensor, z: Tensor, W_dec: Tensor, silent: Pattern) -> Tensor:
    """Add to recon (N, D) what entries decode to whose value z (F,) is 0 and the same in all rows of a latent.

    Nothing is added; the gradient reaches z through W_dec (F, D), at the cost of one sum over the entries.
    """
    return _AddSilent.apply(recon, z, W_dec, silent)  # type: ignore[no-any-return, no-untyped-call]


def per_entry(per_latent: Tensor, pattern: Pattern) -> Tensor:
    """Spread one number per latent (F,) over the entries: (nnz,), or (F,) to broadcast for a full pattern."""
    if pattern.is_full:
        return per_latent
    return _PerEntry.apply(per_latent, pattern)  # type: ignore[no-any-return, no-untyped-call]


def take_latents(parameter: Tensor, latents: Tensor, axis: int = 0) -> Tensor:
    """Return what a parameter (F, D), (F,), or (D, F) with axis=1, has of some distinct latents (A,): (A, D) or (A,).

    Differentiable. A training step does not spread the gradient over all latents: it adds it to the others' in the end.
    """
    return _TakeLatents.apply(parameter, latents, axis)  # type: ignore[no-any-return, no-untyped-call]


def sum_by_latent(values: Tensor, pattern: Pattern) -> Tensor:
    """Return the sum of values (nnz,) over the rows of each latent: (F,), always added in the order of the rows."""
    if pattern.is_full:
        return values.sum(0)
    if not host_waits(values):
        return values.new_zeros(pattern.d_sae).index_add_(0, pattern.entries[0], values)
    return _sum_ordered(values[pattern.transposed.order], pattern)


def _sum_ordered(ordered: Tensor, pattern: Pattern) -> Tensor:
    """`sum_by_latent` of values (nnz,) in the order of `pattern.transposed`."""
    _, rows, offsets = pattern.transposed
    return bag_sum(rows, ones(pattern.n_rows, ordered), offsets, ordered).squeeze(1)


def sum_rows_by_latent(table: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """Return the sum over the entries of each latent of their rows of table (N, D) times values (nnz,): (F, D)."""
    if pattern.is_full:
        return values.t() @ table
    kept, pattern = _without_zeros(values, pattern)
    order, rows, offsets = pattern.transposed
    return bag_sum(rows, table, offsets, values[kept][order])


class _EncodeAt(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc)
        ctx.pattern, ctx.step = pattern, current()
        return values.view_as(values)

    @staticmethod
    @once_differentiable  # a second derivative would miss the bias
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, W_enc = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        needs_x, needs_W, _, _, _, needs_bias = ctx.needs_input_grad
        grad_x = grad_W = None
        if pattern.is_full:
            grad_b = grad.sum(0)
            grad_x = grad @ W_enc.t() if needs_x else None
            grad_W = (grad.t() @ x).t() if needs_W else None
        else:
            kept, live = _without_zeros(grad, pattern)
            ordered = grad[kept][live.transposed.order]
            grad_b = _sum_ordered(ordered, live) if host_waits(grad) else sum_by_latent(grad, pattern)
            if needs_x:
                grad_x = bag_sum(live.entries[0], W_enc.t().contiguous(), live.entries[1], grad[kept])
            if needs_W:
                grad_W = _sum_by_latent(x, ordered, live, W_enc.t(), ctx.step).t()
        return grad_x, grad_W, grad_b, None, None, -(W_enc @ grad_b) if needs_bias else None


class _Decode(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.pattern, ctx.step = pattern, current()
        ctx.live = kept, live_pattern = _without_zeros(values, pattern)
        indices, indptr = live_pattern.entries
        return bag_sum(indices, W_dec, indptr, values[kept])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        values, W_dec = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        grad_values = grad_W = None
        if ctx.needs_input_grad[0]:
            grad_values = _dots(grad.contiguous(), W_dec, pattern)
        if ctx.needs_input_grad[1]:
            kept, live_pattern = ctx.live
            ordered = values[kept][live_pattern.transposed.order]
            grad_W = _sum_by_latent(grad.contiguous(), ordered, live_pattern, W_dec, ctx.step)
        return grad_values, grad_W, None


class _PerEntry(Function):
    @staticmethod
    def forward(ctx: Any, per_latent: Tensor, pattern: Pattern) -> Tensor:
        ctx.pattern = pattern
        return per_latent[pattern.entries[0]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return sum_by_latent(grad, ctx.pattern), None


class _TakeLatents(Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, latents: Tensor, axis: int) -> Tensor:
        ctx.save_for_backward(parameter, latents)
        ctx.axis, ctx.step = axis, current() if parameter.is_leaf else None
        return parameter.movedim(axis, 0).index_select(0, latents)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        parameter, latents = ctx.saved_tensors
        if ctx.step is not None:
            ctx.step.note_rows(RowGradient(parameter, ctx.axis, latents, grad))
            return None, None, None
        spread = torch.zeros_like(parameter)
        spread.movedim(ctx.axis, 0).index_copy_(0, latents, grad)
        return spread, None, None


class _AddSilent(Function):
    @staticmethod
    def forward(ctx: Any, recon: Tensor, z: Tensor, W_dec: Tensor, silent: Pattern) -> Tensor:
        ctx.save_for_backward(W_dec)
        ctx.silent = silent
        return recon.view_as(recon)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (W_dec,) = ctx.saved_tensors
        _, rows, offsets = ctx.silent.transposed
        sums = bag_sum(rows, grad.contiguous(), offsets)
        return grad, torch.linalg.vecdot(sums, W_dec), None, None


def _sum_by_latent(table: Tensor, ordered: Tensor, pattern: Pattern, W: Tensor, step: Deferred | None) -> Tensor:
    """Sum of the entries' rows of table (N, D), times their values (nnz,), by latent: the gradient (F, D) of W.

    The values are in the order of `pattern.transposed`. A step that asked for the gradient's norm is told.
    """
    _, rows, offsets = pattern.transposed
    projects = None if step is None else step.wants_square(W)
    if step is None or projects is None or not takes_triton(table):
        return bag_sum(rows, table, offsets, ordered)
    grad, square = bag_sum_and_square(rows, table, offsets, ordered, W if projects else None)
    step.note_square(W, grad, square)
    return grad


def _dots(rows: Tensor, latents: Tensor, pattern: Pattern) -> Tensor:
    """rows (N, D) . latents (F, D) at the entries: (nnz,)."""
    if rows.device.type != "cpu":
        return sampled_dot(rows, latents, pattern.entries[1], pattern.entries[0])
    # Latent by latent, the rows that are read again and again are few enough for the processor's cache.
    order, row_of, offsets = pattern.transposed
    by_latent = sampled_dot(latents, rows, offsets, row_of)
    return torch.empty_like(by_latent).index_copy_(0, order, by_latent)


def _without_zeros(values: Tensor, pattern: Pattern) -> tuple[Tensor | slice, Pattern]:
    """Which entries are not zero, and their pattern; all of them if more than half are. Zeros add nothing to a sum.

    gated stores latents whose gate is open and whose magnitude is zero, topk those under zero among the k largest.
    """
    if takes_triton(values) or host_waits(values):  # Triton kernels do not read the rows of zeros
        return slice(None), pattern
    live = values != 0
    if 2 * int(live.count_nonzero()) >= values.numel():
        return slice(None), pattern
    kept = live.nonzero().squeeze(1)
    indices, _ = pattern.entries
    return kept, Pattern.of_rows(pattern.row_of[kept], indices[kept], pattern.n_rows, pattern.d_sae)


def empty_encoder(d_in: int, d_sae: int) -> Tensor:
    """An uninitialized W_enc (d_in, d_sae) with latent-contiguous strides."""
    return torch.empty(d_sae, d_in).t()
