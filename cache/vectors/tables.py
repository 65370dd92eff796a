"""Vectors in Parquet and Arrow files: a column of lists of numbers, and columns of ids, texts and other values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sae_granary.cache.format.storage import Array
from sae_granary.cache.vectors.fields import Field, VectorFile, VectorFileError, batch_rows


class TableFile(VectorFile):
    """A file with an Arrow schema."""

    def __init__(self, path: Path, schema: Any) -> None:
        super().__init__(path)
        self.schema = schema

    @property
    def fields(self) -> dict[str, Field]:
        """Its columns."""
        return {field.name: _field(field) for field in self.schema}

    def width(self, name: str) -> int:
        """Numbers in a vector: those of the first row where the schema does not say."""
        known = self.fields[name].width
        if known is not None:
            return known
        for batch in self._batches([name], 1, 0):
            if len(batch):
                first = batch.column(0)[0]
                if not first.is_valid:
                    raise self.error(f"row 0: {name} is null")
                return len(first)
        raise self.error("it has no rows")

    def batches(self, names: Sequence[str], width: int, start: int) -> Iterator[dict[str, Any]]:
        """Rows of several columns together."""
        row = start
        for batch in self._batches(names, batch_rows(width * 4), start):
            columns = zip(names, batch.columns, strict=True)
            fields = self.fields
            yield {
                name: self._vectors(column, name, width, row) if fields[name].is_vector else column.to_pylist()
                for name, column in columns
            }
            row += len(batch)

    def _vectors(self, column: Any, name: str, width: int, row: int) -> Array:
        """(N, width) of a column of lists; the error names the first row that is null or of another length."""
        column = column.storage if isinstance(column, pa.ExtensionArray) else column
        if column.null_count:
            raise self.error(f"row {row + _first(pc.is_null(column))}: {name} is null")
        if not pa.types.is_fixed_size_list(column.type):
            wrong = pc.not_equal(pc.list_value_length(column), width)
            if pc.any(wrong).as_py():
                at = _first(wrong)
                raise self.error(f"row {row + at}: {name} has {len(column[at])} numbers, expected {width}")
        flat = column.flatten()
        values: Array = flat.to_numpy(zero_copy_only=False).reshape(len(column), width)
        return values

    def _batches(self, names: Sequence[str], n_rows: int, start: int) -> Iterator[Any]:
        """Record batches of these columns, from a row on."""
        raise NotImplementedError


class ParquetFile(TableFile):
    """A Parquet file; row groups before `start` are not read."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = pq.ParquetFile(path)
            super().__init__(path, self._file.schema_arrow)
        except (pa.ArrowException, OSError) as error:
            raise VectorFileError(f"{path} is not a readable Parquet file: {error}") from None

    def n_rows(self, name: str) -> int | None:
        """Rows, from the footer."""
        return int(self._file.metadata.num_rows)

    def _batches(self, names: Sequence[str], n_rows: int, start: int) -> Iterator[Any]:
        metadata, groups = self._file.metadata, list(range(self._file.metadata.num_row_groups))
        while groups and start >= metadata.row_group(groups[0]).num_rows:
            start -= metadata.row_group(groups.pop(0)).num_rows
        try:
            for batch in self._file.iter_batches(n_rows, row_groups=groups, columns=list(names), use_threads=False):
                if start >= len(batch):
                    start -= len(batch)
                    continue
                yield batch.slice(start).select(list(names))
                start = 0
        except (pa.ArrowException, OSError) as error:
            raise self.error(f"not readable: {error}") from None


class ArrowFile(TableFile):
    """An Arrow IPC file (Feather) or stream (as Hugging Face data sets are stored), mapped."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self._is_file = file.read(6) == b"ARROW1"
            with self._reader(path) as reader:
                super().__init__(path, reader.schema)
        except (pa.ArrowException, OSError) as error:
            raise VectorFileError(f"{path} is not a readable Arrow file: {error}") from None

    def _reader(self, path: Path) -> Any:
        source = pa.memory_map(str(path))
        return pa.ipc.open_file(source) if self._is_file else pa.ipc.open_stream(source)

    def n_rows(self, name: str) -> int | None:
        """Rows, counted from the headers of the batches."""
        return sum(len(batch) for batch in self._records())

    def _records(self) -> Iterator[Any]:
        try:
            with self._reader(self.path) as reader:
                if self._is_file:
                    yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
                else:
                    yield from reader
        except (pa.ArrowException, OSError) as error:
            raise self.error(f"not readable: {error}") from None

    def _batches(self, names: Sequence[str], n_rows: int, start: int) -> Iterator[Any]:
        for batch in self._records():
            if start >= len(batch):
                start -= len(batch)
                continue
            for first in range(start, len(batch), n_rows):
                yield batch.slice(first, n_rows).select(list(names))
            start = 0


def _field(field: Any) -> Field:
    kind = field.type.storage_type if isinstance(field.type, pa.ExtensionType) else field.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    numbers = lists and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))
    width = kind.list_size if numbers and pa.types.is_fixed_size_list(kind) else None
    return Field(field.name, numbers, str(field.type), width)


def _first(mask: Any) -> int:
    return int(pc.index(mask, True).as_py())
