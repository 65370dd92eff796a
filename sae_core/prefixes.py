"""Nested prefixes of a dictionary: the codes are decoded once, group by group, and each prefix is a sum of groups.

Shapes: N rows, D = d_out, F = d_sae, P groups of latents and so many prefixes, the last of which is all of them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sae_granary.sae_core.autograd import decode
from sae_granary.sae_core.codes import Codes, Pattern, sort_narrow

CACHED_ENTRIES = 2**20  # of (P, N, D) at a time, 4 MiB of float32: what the caches of a processor hold


def decode_groups(codes: Codes, W_dec: Tensor, group_of: Tensor, n_groups: int) -> Tensor:
    """Decode each group of latents on its own: (P, N, D), whose sum over groups is `decode`.

    group_of (F,) int64 gives each latent's group. Groups become rows of one larger pattern, so the price is one decode.
    """
    pattern = codes.pattern
    indices = pattern.entries[0]
    group_row = group_of[indices] * pattern.n_rows + pattern.row_of
    order = sort_narrow(group_row, n_groups * pattern.n_rows).indices
    by_group = Pattern.of_rows(group_row[order], indices[order], n_groups * pattern.n_rows, pattern.d_sae)
    decoded = decode(Codes(codes.values[order], by_group), W_dec)
    return decoded.view(n_groups, pattern.n_rows, -1)


def prefix_errors(groups: Tensor, start: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Squared errors (N,) of all proper prefixes together, and what the last prefix reconstructs, (N, D).

    Prefix i reconstructs start + groups[0] + ... + groups[i], and its error is the squared distance from target (N, D).
    groups (P, N, D), P at least 2, start (D,). One pass over some rows at a time does for all prefixes and their
    gradients.
    """
    return _PrefixErrors.apply(groups, start, target)  # type: ignore[no-any-return, no-untyped-call]


class _PrefixErrors(Function):
    @staticmethod
    def forward(ctx: Any, groups: Tensor, start: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        n_inner, n_rows, _ = groups[:-1].shape
        errors, whole = groups.new_zeros(n_rows), torch.empty_like(groups[-1])
        pulls = torch.empty_like(groups[:-1])  # at i the sum of the residuals of proper prefixes that hold group i
        for rows in _row_blocks(groups):
            total = start
            for i in range(n_inner):
                total = total + groups[i, rows]
                residual = torch.sub(total, target[rows], out=pulls[i, rows])
                errors[rows] += torch.linalg.vector_norm(residual, dim=-1).square_()
            torch.add(total, groups[-1, rows], out=whole[rows])
            for i in reversed(range(n_inner - 1)):
                pulls[i, rows] += pulls[i + 1, rows]
        ctx.save_for_backward(pulls)
        return errors, whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_errors: Tensor, grad_whole: Tensor) -> Any:
        (pulls,) = ctx.saved_tensors
        slopes = 2 * grad_errors[:, None]
        grad = pulls.new_empty(len(pulls) + 1, *grad_whole.shape)
        for pull, out in zip(pulls, grad, strict=False):
            torch.addcmul(grad_whole, pull, slopes, out=out)
        grad[-1] = grad_whole
        grad_target = pulls[0] * -slopes if ctx.needs_input_grad[2] else None
        return grad, grad[0].sum(0), grad_target


def _row_blocks(groups: Tensor) -> Iterator[slice]:
    """Some rows at a time on a CPU; on other devices one launch over all of them is faster."""
    n_groups, n_rows, width = groups.shape
    size = max(1, CACHED_ENTRIES // (n_groups * width)) if groups.device.type == "cpu" else max(1, n_rows)
    for start in range(0, n_rows, size):
        yield slice(start, start + size)
