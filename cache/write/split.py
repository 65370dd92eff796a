"""Checks of rows before they are written, and where they are split over shards: pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sae_granary.cache.errors import BadRowsError
from sae_granary.cache.format.layout import COLUMNS, CacheLayout
from sae_granary.cache.format.storage import float_dtypes
from sae_granary.common.rows import FLAG_ABSENT, DocumentRow, Rows


def check_rows(rows: Rows, layout: CacheLayout, last_window: int) -> None:
    """Raise BadRowsError unless the rows are N rows of whole windows after `last_window`, for these hook points."""
    n_rows = rows.n_rows
    for name in COLUMNS:
        _check_column(name, getattr(rows, name), layout.columns[name].storage.numpy, len(rows.window))
    if set(rows.activations) != set(layout.activations):
        raise BadRowsError(f"hook points are {sorted(rows.activations)}, expected {sorted(layout.activations)}")
    for name, values in rows.activations.items():
        expected = layout.activations[name].shape(n_rows)
        if values.shape != expected or values.dtype.name not in float_dtypes():
            got = f"{values.dtype.name}{values.shape}"
            raise BadRowsError(
                f"activations of {name!r} are {got}, expected {expected} of {', '.join(sorted(float_dtypes()))}"
            )
    if n_rows and int(rows.window[0]) <= last_window:
        raise BadRowsError(
            f"window {int(rows.window[0])} comes after window {last_window}: windows must be whole and ascend"
        )
    if (rows.window[1:] < rows.window[:-1]).any():
        raise BadRowsError("windows are not in source order: their numbers must ascend")
    if (rows.flags & FLAG_ABSENT).any():
        raise BadRowsError(f"flags contain {FLAG_ABSENT:#x}, which marks absent rows")


def _check_column(name: str, values: npt.NDArray[np.integer], stored: np.dtype[np.generic], n_rows: int) -> None:
    if values.shape != (n_rows,) or values.dtype.kind not in "iu":
        raise BadRowsError(f"{name} is {values.dtype.name}{values.shape}, expected {stored.name}({n_rows},)")
    if n_rows and not np.can_cast(values.dtype, stored):
        limits = np.iinfo(stored.name)
        low, high = int(values.min()), int(values.max())
        if low < limits.min or high > limits.max:
            raise BadRowsError(f"{name} holds {low} to {high}, out of the range of {stored.name}")


def split_windows(lengths: Sequence[int] | npt.NDArray[np.int64], used: int, rows_per_shard: int) -> Iterator[int]:
    """Rows for each shard in turn, whole windows only, first for the open shard that holds `used` rows already.

    A zero means that not even the next window fits there. A window longer than a shard is an error.
    """
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
    if len(ends) and int(np.max(lengths)) > rows_per_shard:
        raise BadRowsError(
            f"a window of {int(np.max(lengths))} rows cannot fit a shard of {rows_per_shard}: larger shards"
        )
    n_windows, start, room = 0, 0, rows_per_shard - used
    while n_windows < len(ends):
        fits = int(np.searchsorted(ends, start + room, side="right"))
        end = int(ends[fits - 1]) if fits > n_windows else start
        yield end - start
        n_windows, start, room = fits, end, rows_per_shard


def shard_parts(
    rows: Rows, placed: Sequence[tuple[int, DocumentRow]], used: int, rows_per_shard: int
) -> Iterator[tuple[Rows, list[DocumentRow]] | None]:
    """Rows with the documents that begin in them, shard by shard; None where the open shard, of `used` rows, ends."""
    start = 0
    for n_rows in split_windows(np.unique(rows.window, return_counts=True)[1], used, rows_per_shard):
        stop = start + n_rows
        if n_rows:
            yield rows[start:stop], [document for row, document in placed if start <= row < stop]
        if stop < rows.n_rows:
            yield None
        start = stop


def documents_by_row(
    documents: Sequence[DocumentRow], doc_id: npt.NDArray[np.int64], last_document: int
) -> list[tuple[int, DocumentRow]]:
    """(first row, document) in ascending order; documents up to `last_document` are stored already and left out."""
    ids = [document.doc_id for document in documents]
    if any(b <= a for a, b in pairwise(ids)):
        raise BadRowsError("documents are not in source order: doc_id must ascend")
    present, first_row = np.unique(doc_id, return_index=True)
    rows = dict(zip(present.tolist(), first_row.tolist(), strict=True))
    missing = [i for i in ids if i not in rows]
    if missing:
        raise BadRowsError(f"document {missing[0]} has no row among those appended with it")
    return [(rows[d.doc_id], d) for d in documents if d.doc_id > last_document]
