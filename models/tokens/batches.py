"""Sort buffer -> TokenBatch: pure functions.

Shapes: S sequences of a batch, T tokens of its longest, n real tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sae_granary.models.tokens.contexts import Window


@dataclass(frozen=True)
class TokenBatch:
    """Windows padded to the longest of them."""

    input_ids: npt.NDArray[np.int64]  # (S, T)
    attention_mask: npt.NDArray[np.int64] | None  # (S, T); None when nothing is padded
    flat: npt.NDArray[np.int64]  # (n,) places of the real tokens in the flattened (S, T)
    rows: npt.NDArray[np.int64]  # (n,) rows of the sort buffer that they belong to


LIKE = 0.9  # a batch takes no window shorter than this share of its longest, ...
LEAST = 8  # ... unless it holds less than 1/8 of the budget


def plan_batches(
    lengths: Sequence[int], batch_tokens: int, *, padded: bool = True, multiple: int = 1
) -> list[npt.NDArray[np.int64]]:
    """Group contexts of similar length, longest first, each group at most `batch_tokens` including padding.

    A context longer than the budget is a separate batch. Without `padded` all contexts of a group have one length.
    Batches are padded to a multiple of `multiple`. Ties keep their order, so the result depends on the arguments only.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    ordered = np.asarray(lengths)[order]
    batches: list[npt.NDArray[np.int64]] = []
    start = 0
    while start < len(order):
        longest = max(1, int(ordered[start]))
        width = -(-longest // multiple) * multiple
        room = ordered[start : start + max(1, batch_tokens // width)]
        size = int((room >= (LIKE if padded else 1) * longest).sum())
        if padded:
            size = max(size, min(len(room), batch_tokens // LEAST // width))
        batches.append(order[start : start + size])
        start += size
    return batches


def collate(
    windows: Sequence[Window], members: npt.NDArray[np.int64], first_rows: Sequence[int], pad_id: int, multiple: int = 1
) -> TokenBatch:
    """Some windows of a buffer as one batch, padded to a multiple; `first_rows` holds the row where each starts."""
    lengths = np.array([len(windows[index]) for index in members])
    width = -(-int(lengths.max()) // multiple) * multiple
    inside = np.arange(width) < lengths[:, None]
    input_ids = np.full(inside.shape, pad_id, np.int64)
    input_ids[inside] = np.concatenate([windows[index].ids for index in members])
    starts = np.array([first_rows[index] for index in members]) - (np.cumsum(lengths) - lengths)
    rows = np.arange(lengths.sum()) + np.repeat(starts, lengths)
    mask = None if inside.all() else inside.astype(np.int64)
    return TokenBatch(input_ids, mask, np.flatnonzero(inside), rows)
