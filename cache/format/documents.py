"""Documents in Parquet: written in row groups of bounded size, read one row group at a time.

A kept column of the source's records is a column `kept.<name>` of JSON values as text (`"billing"`, `17`, `null`): a
stream does not tell beforehand which types it will hold. Readers that do not know kept columns never ask for them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from sae_granary.cache.errors import BadRowsError, CorruptCacheError, MissingFileError
from sae_granary.cache.format.manifest import DocumentRange, FileEntry
from sae_granary.common.rows import DocumentRow, Scalar

# Row groups are cut by content only: the bytes do not depend on how many documents come per call.
GROUP_DOCUMENTS = 4096
GROUP_TEXT_BYTES = 16 << 20

_TYPES = {"doc_id": pa.int64(), "source": pa.string(), "source_row": pa.int64(), "text": pa.string()}
SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _TYPES.items()])
KEPT = "kept."  # before the name of a kept column: one may be called `text`


class DocumentFile:
    """The documents of the open shard, with their kept columns."""

    def __init__(self, path: Path, kept_columns: Sequence[str] = ()) -> None:
        self.path, self._kept = path, tuple(kept_columns)
        kept = [pa.field(KEPT + name, pa.string(), nullable=False) for name in kept_columns]
        self._schema = pa.schema([*SCHEMA, *kept])
        self.n, self.first, self.last = 0, -1, -1
        self._group: list[list[Any]] = []  # the cells of each document
        self._group_bytes = 0
        self._file = path.open("xb")
        self._writer: Any = pq.ParquetWriter(self._file, self._schema, compression="zstd", write_statistics=["doc_id"])

    @property
    def range(self) -> DocumentRange | None:
        """Which documents are here."""
        return DocumentRange(self.n, self.first, self.last) if self.n else None

    def append(self, documents: Sequence[DocumentRow]) -> None:
        """Add documents, in ascending order."""
        for document in documents:
            cells = [*(getattr(document, name) for name in SCHEMA.names), *_kept_cells(document, self._kept)]
            self._group.append(cells)
            self._group_bytes += _utf8_bytes(document, cells)
            self.first = document.doc_id if self.n == 0 else self.first
            self.last, self.n = document.doc_id, self.n + 1
            if len(self._group) >= GROUP_DOCUMENTS or self._group_bytes >= GROUP_TEXT_BYTES:
                self._flush()

    def finish(self) -> FileEntry:
        """Write what is left, sync and close."""
        if self._group:
            self._flush()
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return hash_file(self.path)

    def close(self) -> None:
        """Close an unfinished file."""
        with contextlib.suppress(OSError, pa.ArrowException):  # the disk may be full: what is here is thrown away
            self._writer.close()
        with contextlib.suppress(OSError):  # of what its buffer held; the descriptor is closed all the same
            self._file.close()

    def _flush(self) -> None:
        cells = zip(*self._group, strict=True)
        columns = [_column(field.type, list(values)) for field, values in zip(self._schema, cells, strict=True)]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema), row_group_size=len(self._group))
        self._group, self._group_bytes = [], 0


def _column(kind: Any, values: list[Any]) -> Any:
    """An Arrow array from its buffers: pa.array() of a list imports pandas, half a second at the end of a harvest."""
    if kind == pa.int64():
        numbers = np.asarray(values).astype(np.int64, casting="safe")
        return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(numbers)])
    encoded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)])
    if ends[-1] > np.iinfo(np.int32).max:  # one document of 2 GiB: Arrow cuts the column in chunks
        return pa.array(values, kind)
    offsets = pa.py_buffer(ends.astype(np.int32))
    return pa.Array.from_buffers(kind, len(values), [None, offsets, pa.py_buffer(b"".join(encoded))])


def hash_file(path: Path) -> FileEntry:
    """Size and checksum of a file on disk."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
        return FileEntry(file.tell(), digest)


def read_document(path: Path, doc_id: int, kept_columns: tuple[str, ...] = ()) -> DocumentRow | None:
    """The document of this id with its kept columns, or None."""
    with _readable(path):
        stat = path.stat()
    version = (stat.st_ino, stat.st_mtime_ns)  # another cache may come to the same path
    for group, (first, last) in enumerate(_group_ranges(path, version)):
        if first <= doc_id <= last:
            return _group_documents(path, version, group, kept_columns).get(doc_id)
    return None


def read_doc_ids(path: Path) -> list[int]:
    """The ids of all documents in a file, in order."""
    ids: list[int] = _read_column(path, "doc_id")
    return ids


def read_kept_column(path: Path, name: str) -> list[Scalar]:
    """The values of a kept column of all documents in a file, in order."""
    known: dict[str, Scalar] = {}  # few values of a category, parsed once each
    return [_parsed(text, path, known) for text in _read_column(path, KEPT + name)]


def _read_column(path: Path, name: str) -> list[Any]:
    with _readable(path), pq.ParquetFile(path) as file:
        values: list[Any] = file.read(columns=[name])[name].to_pylist()
    return values


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """MissingFileError where a file has gone, CorruptCacheError where it is not one of documents."""
    try:
        yield
    except FileNotFoundError:
        raise MissingFileError(f"{path} has gone since the cache was opened") from None
    except (pa.ArrowException, OSError, KeyError, AttributeError) as error:
        raise CorruptCacheError(f"{path} is not a readable Parquet file of documents: {error}") from None


@functools.lru_cache(maxsize=64)
def _group_ranges(path: Path, version: tuple[int, int]) -> list[tuple[int, int]]:
    with _readable(path):
        metadata = pq.read_metadata(path)
        columns = [metadata.row_group(i).column(0).statistics for i in range(metadata.num_row_groups)]
        return [(int(s.min), int(s.max)) for s in columns]


@functools.lru_cache(maxsize=8)
def _group_documents(path: Path, version: tuple[int, int], group: int, kept: tuple[str, ...]) -> dict[int, DocumentRow]:
    with _readable(path):
        with pq.ParquetFile(path) as file:
            rows = file.read_row_group(group, columns=[*SCHEMA.names, *(KEPT + name for name in kept)]).to_pylist()
        known: dict[str, Scalar] = {}
        columns = [{name: _parsed(row.pop(KEPT + name), path, known) for name in kept} for row in rows]
    return {row["doc_id"]: DocumentRow(**row, columns=kept) for row, kept in zip(rows, columns, strict=True)}


def _parsed(text: str, path: Path, known: dict[str, Scalar]) -> Scalar:
    """A value from its JSON; `known` remembers what was parsed before."""
    if text not in known:
        try:
            value = json.loads(text)
        except (ValueError, TypeError, RecursionError):
            value = ()
        if not isinstance(value, Scalar):
            raise CorruptCacheError(f"{path} holds {text!r:.60} in a kept column, expected a JSON scalar") from None
        known[text] = value
    return known[text]


def _kept_cells(document: DocumentRow, kept: tuple[str, ...]) -> list[str]:
    """The JSON of the kept columns. Raises BadRowsError."""
    if document.columns.keys() != set(kept):
        raise BadRowsError(f"document {document.doc_id} has columns {list(document.columns)}, expected {list(kept)}")
    values = [document.columns[name] for name in kept]
    try:
        if all(isinstance(value, Scalar) for value in values):
            return [json.dumps(value, ensure_ascii=False, allow_nan=False) for value in values]
    except ValueError:  # NaN or Inf
        pass
    raise BadRowsError(f"document {document.doc_id} keeps {values!r:.200}, expected texts, finite numbers, bools, None")


def _utf8_bytes(document: DocumentRow, cells: list[Any]) -> int:
    try:
        return sum(len(cell.encode()) for cell in cells if isinstance(cell, str))
    except UnicodeEncodeError as error:
        raise BadRowsError(
            f"document {document.doc_id} of {document.source}: not Unicode ({error}); replace lone surrogates"
        ) from None
