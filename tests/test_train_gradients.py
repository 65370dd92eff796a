"""The norm of all gradients together."""

import copy

import pytest
import torch
from torch import nn

from sae_granary.train.optim.gradients import clip, global_norm
from sae_granary.train.optim.optimizers import Hyperparameters, make_optimizer


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


@pytest.mark.parametrize(("name", "torchs"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_takes_the_steps_of_torch_and_none_without_gradients(name: str, torchs: type) -> None:
    ours = [nn.Parameter(torch.randn(6, 4).t()), nn.Parameter(torch.randn(5))]
    theirs = copy.deepcopy(ours)
    hyperparameters = Hyperparameters(0.1, 0.5, weight_decay=0.01, beta1=0.9, beta2=0.99, eps=1e-8)
    optimizer = make_optimizer(ours, name, hyperparameters)
    optimizer.step()
    assert not optimizer.state
    groups = [{"params": theirs[:1]}, {"params": theirs[1:]}]
    other = torchs(groups, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01, fused=True)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        assert p.stride() == optimizer.state[p]["exp_avg"].stride()
        torch.testing.assert_close(p, q, rtol=0, atol=0)
        assert optimizer.state[p]["step"] == other.state[q]["step"] == 4
