"""Documents of a cache as columns of an Arrow table: their source, and the columns kept at harvest."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_granary.analyze.encoding.export import FIXED_COLUMNS, DocumentColumns
from sae_granary.cache.read.reader import Cache
from sae_granary.common.rows import Scalar


def document_columns(cache: Cache) -> DocumentColumns:
    """Return a function from document ids to columns. Memory: the kept columns of all documents.

    A kept column that shares its name with another column of the table is called `kept.<name>`, with more `kept.` if
    needed.
    """
    import pyarrow as pa

    ids = np.array(cache.document_ids(), np.int64)
    names = table_names(cache.kept_columns)
    kept = {name: arrow_column(cache.document_column(column)) for column, name in names.items()}

    def columns_of(doc_ids: NDArray[np.int64]) -> Mapping[str, Any]:
        each, which = np.unique(doc_ids, return_inverse=True)
        documents = [cache.find_document(int(doc_id)) for doc_id in each]
        sources = pa.array([document and document.source for document in documents], pa.string())
        found = np.searchsorted(ids, doc_ids)
        missing = ids[np.minimum(found, len(ids) - 1)] != doc_ids if len(ids) else np.ones(len(doc_ids), bool)
        place = pa.array(found, mask=missing)
        return {"source": sources.take(pa.array(which)), **{name: column.take(place) for name, column in kept.items()}}

    return columns_of


def table_names(kept_columns: Sequence[str]) -> dict[str, str]:
    """Kept columns -> unique names in the table."""
    names = {}
    for column in kept_columns:
        name = column
        while name in FIXED_COLUMNS or (name != column and name in kept_columns):
            name = f"kept.{name}"
        names[column] = name
    return names


def arrow_column(values: Sequence[Scalar]) -> Any:
    """An Arrow array of one type: bool, int64, double or string.

    Mixed values, and integers that the others' type cannot hold, become their JSON; texts stay unchanged.
    """
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds == {int} and all(value is None or -(2**63) <= value < 2**63 for value in values):  # type: ignore[operator]
        return pa.array(values, pa.int64())
    too_large = any(isinstance(value, int) and abs(value) > sys.float_info.max for value in values)
    if float in kinds and kinds <= {int, float} and not too_large:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return pa.array(texts, pa.string())
