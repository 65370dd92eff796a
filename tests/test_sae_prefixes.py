"""The errors of nested prefixes in one pass: gradients against differences, and parts against the whole."""

import pytest
import torch

from sae_granary.sae_core.variants import matryoshka
from sae_granary.sae_core.variants.matryoshka import prefix_errors

P, N, D = 4, 6, 3


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((P, N, D), (D,), (N, D))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("cached_entries", [P * D * 4, 2**20], ids=["rows 4 and 2", "all rows"])
def test_gradients_of_groups_start_and_target(cached_entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matryoshka, "CACHED_ENTRIES", cached_entries)
    assert torch.autograd.gradcheck(prefix_errors, inputs())


@pytest.mark.parametrize("cached_entries", [P * D * 4, 2**20], ids=["rows 4 and 2", "all rows"])
def test_errors_are_those_of_the_proper_prefixes(cached_entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matryoshka, "CACHED_ENTRIES", cached_entries)
    groups, start, target = (tensor.detach() for tensor in inputs())
    errors, whole = prefix_errors(groups, start, target)
    sums = start + groups.cumsum(0)
    torch.testing.assert_close(errors, (sums[:-1] - target).square().sum((0, 2)))
    torch.testing.assert_close(whole, sums[-1])
