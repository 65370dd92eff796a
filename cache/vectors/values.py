"""Vectors and the values beside them, as a cache can store them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_granary.cache.errors import BadRowsError
from sae_granary.cache.format.manifest import ShardRecord
from sae_granary.cache.format.storage import STORAGE, Array, float_dtypes
from sae_granary.common.rows import FLAG_WINDOW_START, Rows, Scalar
from sae_granary.common.signed import digest


class BadVectorError(BadRowsError):
    """A vector or id that cannot be stored; `row` is its index among those given."""

    def __init__(self, row: int, problem: str) -> None:
        self.row, self.problem = row, problem
        super().__init__(f"row {row}: {problem}")


def vectors_of(rows: Any, d_in: int) -> Array:
    """(N, d_in) finite vectors in a type that can be stored. Raises BadRowsError, and BadVectorError with the row."""
    if hasattr(rows, "detach"):  # a torch tensor
        rows = rows.detach().cpu()
        rows = rows.float().numpy() if str(rows.dtype) == "torch.bfloat16" else rows.numpy()
    try:
        values: Array = np.asarray(rows)
    except ValueError:
        raise BadRowsError(f"vectors are ragged: expected rows of {d_in} numbers") from None
    if values.dtype.kind not in "fiu" and values.dtype.name not in STORAGE:
        raise BadRowsError(f"vectors are of type {values.dtype}, expected numbers")
    if values.ndim != 2 or values.shape[1] != d_in:
        raise BadRowsError(f"vectors have the shape {values.shape}, expected (N, {d_in})")
    if values.dtype.name not in float_dtypes():
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    finite = np.isfinite(values)
    if not finite.all():
        row, column = divmod(int((~finite).argmax()), d_in)
        raise BadVectorError(row, f"value {float(values[row, column])!r} in column {column}, expected finite numbers")
    return values


def contents(records: Sequence[ShardRecord]) -> dict[str, str]:
    """What a finished cache holds, by the checksums of its files."""
    return {"contents_xxh3": digest("".join(f.xxh3 for r in records for f in r.files.values()).encode())}


def plain_value(value: Any) -> Scalar:
    """A value as JSON can hold it: numpy's and Arrow's scalars as Python's, dates as ISO text, NaN as None."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    plain: Scalar = value.isoformat() if hasattr(value, "isoformat") else value
    return plain


def plain_values(name: str, values: Sequence[Any]) -> list[Scalar]:
    """The values of a column as JSON can hold them. Raises BadVectorError for one that is no text, number or bool."""
    plain = [plain_value(value) for value in values]
    for row, value in enumerate(plain):
        if value is not None and not isinstance(value, (str, int, float, bool)):
            raise BadVectorError(row, f"{name} is {value!r:.60}, expected a text, a number or a bool; leave it out")
    return plain


def rows_of(hook: str, values: Array, number: npt.NDArray[np.int64]) -> Rows:
    """Rows of these numbers, a text and a window each."""
    n = len(number)
    return Rows(
        {hook: values},
        token_id=np.full(n, -1, np.int32),
        doc_id=number,
        window=number.astype(np.uint64),
        position=np.zeros(n, np.int32),
        doc_position=np.zeros(n, np.int32),
        flags=np.full(n, FLAG_WINDOW_START, np.uint8),
    )
