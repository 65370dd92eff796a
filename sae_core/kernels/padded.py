"""Selections whose number of slots does not depend on the data, so that the host need not wait for it.

Shapes: N rows, F columns, S slots. Slots without an entry come last; they are at the last row and column with the value
ABSENT, which every activation function maps to 0 with gradient 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor

ABSENT = -1e30


class Slots(NamedTuple):
    """Places in a (N, F) matrix, row by row."""

    rows: Tensor  # (S,) int64, ascending
    columns: Tensor  # (S,) int64
    absent: Tensor  # (S,) bool


def true_slots(mask: Tensor, n_slots: int) -> Slots:
    """The first n_slots true entries of a mask (N, F)."""
    found = torch.nonzero_static(mask.reshape(-1), size=n_slots, fill_value=-1).squeeze(1)
    absent = found < 0
    positions = found.masked_fill_(absent, mask.numel() - 1)
    rows = positions // mask.shape[1]
    return Slots(rows, positions - rows * mask.shape[1], absent)


def largest_slots(matrix: Tensor, n_slots: int) -> tuple[Slots, Tensor]:
    """The n_slots largest entries of the whole matrix (N, F), and their values (S,); none is absent."""
    positions = matrix.reshape(-1).topk(min(n_slots, matrix.numel()), sorted=False).indices.sort().values
    rows = positions // matrix.shape[1]
    values = matrix.reshape(-1)[positions]
    return Slots(rows, positions - rows * matrix.shape[1], torch.zeros_like(rows, dtype=torch.bool)), values
