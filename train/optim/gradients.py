"""Norms of gradients, clipping by the global one, and gradients of single latents."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sae_granary.sae_core import SAE
from sae_granary.sae_core.kernels.deferred import Deferred, host_waits
from sae_granary.sae_core.kernels.sparse import add_rows_and_squares
from sae_granary.sae_core.ranks.sharded import latent_axis

Parameters = list[nn.Parameter]


@dataclass(frozen=True, eq=False)
class Gradients:
    """What is known of gradients that are in `.grad`, unclipped."""

    finite: bool
    fits: bool  # whether all selections had enough room; if not, the gradients are wrong
    norm: float
    norms: Mapping[nn.Parameter, Tensor]  # of those that are known, without the parts along unit-norm rows
    norm_in_units: float  # norm of the gradients of the loss in its own units
    clipped: Parameters


def norm_of_all(sae: SAE, parameters: Iterable[nn.Parameter], known: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """`global_norm` of the gradients of some parameters, where ranks divide the latents with those of all shards.

    Some norms are known: of the latents of this rank, scalars.
    """
    given = [p for p in parameters if p.grad is not None]
    if sae.shards.n == 1:
        return global_norm((p.grad for p in given if p.grad is not None and p not in known), known.values())
    norms, wanted = norms_by_name(sae, known), {id(p) for p in given}
    total: Tensor = torch.stack([norms[name] for name, p in sae.named_parameters() if id(p) in wanted]).norm()
    return total


def global_norm(grads: Iterable[Tensor], known: Iterable[Tensor] = ()) -> Tensor:
    """Euclidean norm of all entries of all gradients, a scalar; of others the norms are known, scalars.

    Of a matrix the norms of its rows (or columns, where these are contiguous) come first: one number from each takes
    two thirds of the time of one number from all.
    """
    norms = [*map(_row_norms, grads), *(norm.reshape(1) for norm in known)]
    total: Tensor = torch.linalg.vector_norm(torch.cat(norms))
    return total


def clip(parameters: Iterable[nn.Parameter], max_norm: float | None, norm: float) -> float:
    """Scale gradients down in place if their global norm exceeds the allowed one; return the factor."""
    if max_norm is None or np.float32(norm) <= np.float32(max_norm):  # else every gradient would be multiplied by 1
        return 1.0
    factor = float(1 / (np.float32(norm) + np.float32(1e-6)) * np.float32(max_norm))  # to the bit as torch.nn.utils
    grads = [p.grad for p in parameters if p.grad is not None]
    if grads:
        torch._foreach_mul_(grads, factor)
    return factor


def add_rows(step: Deferred) -> None:
    """Add the gradients of single latents that a backward pass left in the step to those of their parameters."""
    for parameter, axis, latents, more in step.rows_to_add():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        rows, grad = parameter.detach().movedim(axis, 0), parameter.grad.movedim(axis, 0)
        if step.square(rows, grad) is None:
            grad.index_copy_(0, latents, grad.index_select(0, latents).add_(more))
        else:  # the kernel that wrote the gradient has told its norm
            unit = rows if step.wants_square(rows) else None
            step.add_to_square(rows, grad, add_rows_and_squares(grad, latents, more, unit))


def norms_by_name(sae: SAE, known: Mapping[nn.Parameter, Tensor]) -> dict[str, Tensor]:
    """Norm of the gradient of each parameter, a scalar, by name; some are known. Of the latents of all shards."""
    named = {name: p for name, p in sae.named_parameters() if p.grad is not None}
    own = {name: known[p] if p in known else p.grad.norm() for name, p in named.items() if p.grad is not None}
    if sae.shards.n == 1:
        return own
    divided = [name for name, p in named.items() if latent_axis(name, p.ndim, sae.latents) is not None]
    sums = sae.shards.sum(torch.stack([own[name].square() for name in divided])).sqrt()
    return {**own, **dict(zip(divided, sums.unbind(), strict=True))}


def _row_norms(grad: Tensor) -> Tensor:
    """Norms of the rows of a matrix, the norm of a vector; on a device the vector, since a launch takes longer."""
    if grad.dim() < 2 and host_waits(grad):
        return grad.reshape(-1)
    rows = None if grad.dim() < 2 else min(range(grad.dim()), key=grad.stride)
    norms: Tensor = torch.linalg.vector_norm(grad, dim=rows)
    return norms.reshape(-1)
