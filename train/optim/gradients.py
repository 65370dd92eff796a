"""Global gradient norm."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sae_granary.sae_core import SAE


def clipped(sae: SAE) -> list[nn.Parameter]:
    """The parameters with gradients that a global clip counts and scales: all but those a variant excludes."""
    own = {id(p) for name, p in sae.core.named_parameters() if name in sae.core.unclipped}
    return [p for p in sae.parameters() if p.grad is not None and id(p) not in own]


def global_norm(grads: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all entries of all gradients, a scalar.

    Of a matrix the norms of its rows (or columns, where these are contiguous) come first: one number from each takes
    two thirds of the time of one number from all.
    """
    norms: list[Tensor] = [torch.linalg.vector_norm(grad, dim=_contiguous(grad)).reshape(-1) for grad in grads]
    total: Tensor = torch.linalg.vector_norm(torch.cat(norms))
    return total


def _contiguous(grad: Tensor) -> int | None:
    if grad.dim() < 2:
        return None
    return min(range(grad.dim()), key=grad.stride)
