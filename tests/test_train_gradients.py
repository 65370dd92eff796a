"""The norm of all gradients together."""

import pytest
import torch

from sae_granary.train.optim.gradients import global_norm


def test_norm_by_hand_over_a_vector_a_matrix_and_a_transposed_one() -> None:
    vector, matrix = torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    assert float(global_norm([vector, matrix, torch.full((3, 2), 2.0).t()])) == pytest.approx(7.0)  # 5 + 20 + 24


def test_one_nan_or_inf_shows() -> None:
    for bad in (torch.nan, torch.inf):
        grad = torch.zeros(3, 4)
        grad[1, 2] = bad
        assert not bool(torch.isfinite(global_norm([torch.ones(2), grad])))
