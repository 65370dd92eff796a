"""The documents that files of vectors give, one for each row; and what they take on disk, from the first of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice

from sae_granary.cache.errors import CacheError
from sae_granary.cache.vectors.fields import Columns, VectorFile
from sae_granary.cache.vectors.values import plain_values
from sae_granary.cache.write.disk_space import SAMPLE, bytes_per_document
from sae_granary.common.rows import DocumentRow

ID = "id"  # the kept column that holds ids


def kept_columns(columns: Columns) -> tuple[str, ...]:
    """The columns that are stored with the documents."""
    return ((ID,) if columns.ids is not None else ()) + columns.keep


def document_bytes(file: VectorFile, columns: Columns, width: int) -> float:
    """Bytes on disk of a row's document, measured on the first rows of a file; those before a bad one."""
    documents: list[DocumentRow] = []
    try:
        documents += islice(_documents(file, columns, width), SAMPLE)
        return bytes_per_document(documents, kept_columns(columns))
    except (CacheError, UnicodeError):  # the import will name the row
        return 0.0


def _documents(file: VectorFile, columns: Columns, width: int) -> Iterator[DocumentRow]:
    wanted = [name for name in columns.names if name != columns.vectors]
    if not wanted:
        n_rows = file.n_rows(columns.vectors)
        yield from (DocumentRow(i, file.path.name, i, "", {}) for i in (count() if n_rows is None else range(n_rows)))
        return
    row = 0
    for batch in file.batches(wanted, width, 0):
        texts: Sequence[object] = [""] * len(batch[wanted[0]]) if columns.texts is None else batch[columns.texts]
        kept = {name: plain_values(name, batch[name]) for name in columns.keep}
        if columns.ids is not None:
            kept = {ID: plain_values(ID, batch[columns.ids]), **kept}
        for i, text in enumerate(texts):
            values = {name: values[i] for name, values in kept.items()}
            yield DocumentRow(row + i, file.path.name, row + i, text if isinstance(text, str) else "", values)
        row += len(texts)
