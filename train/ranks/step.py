"""What the ranks of a run add up in a step. Alone, nothing is done."""

from __future__ import annotations

import torch

from sae_granary.sae_core import SAE
from sae_granary.sae_core.ranks.reduce import Alone
from sae_granary.train.state.readback import Numbers


def sum_gradients(sae: SAE, ranks: Alone) -> None:
    """Replace each gradient by the sum over the ranks, whose losses were weighted by their share of the rows.

    A parameter without a gradient on some rank has zeros there. The order of the sum follows from the number of ranks.
    """
    if ranks.n == 1:
        return
    for parameter in sae.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        ranks.sum(parameter.grad)


def sum_numbers(numbers: Numbers, ranks: Alone, share: float = 1.0) -> Numbers:
    """The sums over the ranks of numbers times each rank's share."""
    if ranks.n == 1 or not numbers:
        return numbers
    sums = ranks.sum(torch.tensor(list(map(float, numbers.values())), dtype=torch.float64) * share)
    return dict(zip(numbers, sums.tolist(), strict=True))
