"""The norm of all gradients together."""

import pytest
import torch

from sae_granary.train.optim.gradients import clip, global_norm


def test_norm_by_hand_over_a_vector_a_matrix_and_a_transposed_one() -> None:
    vector, matrix = torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    assert float(global_norm([vector, matrix, torch.full((3, 2), 2.0).t()])) == pytest.approx(7.0)  # 5 + 20 + 24


def test_one_nan_or_inf_shows() -> None:
    for bad in (torch.nan, torch.inf):
        grad = torch.zeros(3, 4)
        grad[1, 2] = bad
        assert not bool(torch.isfinite(global_norm([torch.ones(2), grad])))


@pytest.mark.parametrize("max_norm", [None, 0.3, 1.0, 100.0])
def test_clipping_by_a_known_norm_is_that_of_torch(max_norm: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ours, theirs = ([torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(5))] for _ in range(2))
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        norm = float(global_norm([p.grad for p in ours if p.grad is not None]))
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(theirs, max_norm, torch.tensor(norm))
        factor = clip(ours, max_norm, norm)
        assert all(torch.equal(mine.grad, other.grad) for mine, other in zip(ours, theirs, strict=True))
        assert (factor == 1.0) == (max_norm is None or norm <= max_norm)
