"""Selections whose number of slots does not depend on the data, so that the host need not wait for it.

Shapes: N rows, F columns, S slots. Slots without an entry come last; they are at the last row and column with the value
ABSENT, which every activation function maps to 0 with gradient 0.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

ABSENT = -1e30


class Slots(NamedTuple):
    """Places in a (N, F) matrix, row by row."""

    rows: Tensor  # (S,) int64, ascending
    columns: Tensor  # (S,) int64
    absent: Tensor  # (S,) bool


def true_slots(parts: Iterable[tuple[int, Tensor]], shape: tuple[int, int], n_slots: int) -> tuple[Slots, Tensor]:
    """The first n_slots true entries of a mask of this shape (N, F), and how many there are, a scalar.

    The mask comes in parts of rows (n, F) with the first row of each.
    """
    n_rows, n_columns = shape
    positions, count = torch.empty(0, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    for start, mask in parts:
        found = torch.nonzero_static(mask.reshape(-1), size=n_slots, fill_value=-1).squeeze(1)
        if start == 0:
            positions, count = found, mask.count_nonzero()
            continue
        # Behind those found so far; what is absent, or has no room, goes to a slot that is cut off.
        place = torch.where(found < 0, n_slots, torch.arange(n_slots, device=found.device) + count).clamp_(max=n_slots)
        roomy = torch.nn.functional.pad(positions, (0, 1))
        positions = roomy.scatter_(0, place, found + start * n_columns)[:n_slots]
        count = count + mask.count_nonzero()
    absent = positions < 0
    positions = positions.masked_fill(absent, n_rows * n_columns - 1)
    rows = positions // n_columns
    return Slots(rows, torch.sub(positions, rows, alpha=n_columns), absent), count


def largest_slots(parts: Iterable[tuple[int, Tensor]], shape: tuple[int, int], n_slots: int) -> tuple[Slots, Tensor]:
    """The n_slots largest entries of a matrix of this shape (N, F), and their values (S,); none is absent.

    The matrix comes in parts of rows (n, F) with the first row of each.
    """
    n_columns = shape[1]
    positions, values = torch.empty(0, dtype=torch.int64), torch.empty(0)
    for start, matrix in parts:
        entries = matrix.reshape(-1)
        largest, found = entries.topk(min(n_slots, entries.numel()), sorted=False)
        if start == 0:
            positions, values = found, largest
            continue
        positions, values = torch.cat([positions, found + start * n_columns]), torch.cat([values, largest])
        values, kept = values.topk(min(n_slots, values.numel()), sorted=False)
        positions = positions[kept]
    positions, order = positions.sort()
    rows = positions // n_columns
    slots = Slots(rows, torch.sub(positions, rows, alpha=n_columns), torch.zeros_like(rows, dtype=torch.bool))
    return slots, values[order]
