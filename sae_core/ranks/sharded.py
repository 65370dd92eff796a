"""One SAE whose latents are divided over ranks, for dictionaries that one card cannot hold.

Every rank has all rows of a batch and F / n latents, those after the latents of lower ranks: their columns of W_enc,
rows of W_dec, counters and optimizer state. What the ranks exchange has the size of rows: the k largest pre-activations
of each row (N, k), and the sum of their reconstructions (N, D); no (N, F) matrix leaves a rank. Losses are the same on
all ranks, and each rank gets the gradients of its latents; those of b_dec, which all have, are whole.

Shapes: N rows, D = d_in, F latents of all ranks, F' of this one.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from sae_granary.sae_core.codes import Codes, Pattern
from sae_granary.sae_core.kernels import padded
from sae_granary.sae_core.pre_acts import PreActs
from sae_granary.sae_core.ranks.reduce import Alone

DRAWN_ROWS = 2**14  # at a time; a multiple of 16 entries, so that blocks draw the numbers of one large tensor


def topk(pre_acts: PreActs, k: int, shards: Alone) -> Codes:
    """This rank's part of the k largest of each row over all ranks.

    The pattern has this rank's k largest of each row; those that are not among the k of all ranks are negative.
    """
    n_own = min(k, pre_acts.shape[1])  # of multi_topk a rank may have fewer
    own = pre_acts.topk(n_own)
    if shards.n == 1:
        return own
    values, order = own.values.view(-1, n_own).sort(dim=1, descending=True, stable=True)
    indices = own.indices.view(-1, n_own).gather(1, order)
    values = values.masked_fill(~kept_of_rows(values, k, shards), padded.ABSENT)
    return Codes(values.view(-1), Pattern.fixed_k(indices, pre_acts.shape[1]))


def kept_of_rows(values: Tensor, k: int, shards: Alone) -> Tensor:
    """Mask (N, m) of a rank's values, descending in each row, that are among the k largest of the row over all ranks.

    Among equal values those of lower ranks win, which have the lower latents. Each rank sends k values for each row.
    """
    n_rows, n_own = values.shape
    mine = torch.nn.functional.pad(values, (0, k - n_own), value=-torch.inf) if n_own < k else values
    parts = [part.view(n_rows, k) for part in shards.gather(mine.reshape(-1))]
    smallest = torch.cat(parts, dim=1).topk(k, dim=1).values[:, -1:]
    above = torch.stack([(part > smallest).sum(1) for part in parts])  # (n, N)
    equal = torch.stack([(part == smallest).sum(1) for part in parts])
    left = (k - above.sum(0) - equal[: shards.index].sum(0)).clamp_min(0)
    n_kept = above[shards.index] + torch.minimum(left, equal[shards.index])
    return torch.arange(n_own, device=values.device) < n_kept[:, None]


def normal_rows(shape: torch.Size, generator: torch.Generator, shards: Alone) -> Tensor:
    """The rows (F', D) of this rank in a normal matrix (F, D) that does not depend on the number of ranks."""
    if shards.n == 1:
        return torch.randn(shape, generator=generator, device=generator.device)
    n_own, width = shape
    own, first = torch.empty(shape, device=generator.device), shards.index * n_own
    for start in range(0, n_own * shards.n, DRAWN_ROWS):
        n_drawn = min(DRAWN_ROWS, n_own * shards.n - start)
        drawn = torch.randn(n_drawn, width, generator=generator, device=generator.device)
        low, high = max(start, first), min(start + n_drawn, first + n_own)
        if low < high:
            own[low - first : high - first] = drawn[low - start : high - start]
    return own


def latent_axis(name: str, n_axes: int, per_latent: Container[str]) -> int | None:
    """The axis of a tensor that counts latents; None for one that all ranks have.

    Names are those of an SAE's state, of the optimizer's (`W_enc/exp_avg`) and of `Density`; `per_latent` those of
    `SAE.latents`.
    """
    own = name.partition("/")[0]
    if not n_axes or (own in per_latent and n_axes > 1):
        return None
    if own == "W_enc":
        return 1
    return 0 if own in ("W_dec", "num_tokens_since_fired", "fired") or own in per_latent else None


class _SumValues(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, shards: Alone) -> Tensor:
        return shards.sum(values.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _SumGradients(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, shards: Alone) -> Tensor:
        ctx.shards = shards
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.shards.sum(grad.clone()), None


def sum_values(values: Tensor, shards: Alone) -> Tensor:
    """The sum over the ranks; its gradient, the same on all ranks, is that of each part."""
    return values if shards.n == 1 else _SumValues.apply(values, shards)  # type: ignore[no-untyped-call]


def sum_gradients(values: Tensor, shards: Alone) -> Tensor:
    """The same values on all ranks, whose gradients are added up."""
    return values if shards.n == 1 else _SumGradients.apply(values, shards)  # type: ignore[no-untyped-call]
