"""Parquet and Arrow files -> records."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from sae_granary.common.quantities import byte_size
from sae_granary.harvest.errors import SourceError
from sae_granary.harvest.text.columns import Item
from sae_granary.harvest.text.formats import MAX_WHOLE_BYTES, told_apart

_BATCH_ROWS = 1024  # rows that are read at a time


class Row(NamedTuple):
    """One record of a table."""

    item: Item
    n_bytes: float  # its share of the file
    repaired: bool = False  # bytes that are no UTF-8 were replaced


def read_whole(stream: IO[bytes], path: Path, remedy: str) -> bytes:
    """The bytes of a stream, up to MAX_WHOLE_BYTES. Raises SourceError if there are more."""
    data = stream.read(MAX_WHOLE_BYTES + 1)
    if len(data) > MAX_WHOLE_BYTES:
        raise SourceError(f"{path} holds more than {byte_size(MAX_WHOLE_BYTES)}, and is read whole: {remedy}")
    return data


def _of_schema(names: Sequence[str], wanted: Sequence[str]) -> list[str] | None:
    """Columns of a file that contain the requested ones (`data` for `data.text`); None for all."""
    found = [name for name in names if any(name == want or want.startswith(f"{name}.") for want in wanted)]
    return found or None


def parquet_rows(stream: IO[bytes], path: Path, columns: Sequence[str], kept: Sequence[str]) -> Iterator[Row]:
    """Records of a .parquet file."""
    import pyarrow
    import pyarrow.parquet

    plain = path.suffix.lower() == ".parquet"
    source = stream if plain else io.BytesIO(read_whole(stream, path, "unpack it"))
    try:
        file = pyarrow.parquet.ParquetFile(source)
    except pyarrow.ArrowInvalid as error:
        raise SourceError(f"{path} is not a Parquet file: {error}") from error
    n_bytes = path.stat().st_size / max(1, file.metadata.num_rows)
    names = file.schema_arrow.names
    wanted = _of_schema(names, columns) if len(set(names)) == len(names) else None
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
        batch = _readable(batch, kept)
        yield from (Row(item, n_bytes) for item in batch.to_pylist())


def arrow_rows(stream: IO[bytes], path: Path, columns: Sequence[str], kept: Sequence[str]) -> Iterator[Row]:
    """Records of a file written by `Dataset.save_to_disk` (an IPC stream), or of an IPC file."""
    import pyarrow

    plain = path.suffix.lower() == ".arrow"
    source = pyarrow.memory_map(str(path)) if plain else pyarrow.BufferReader(read_whole(stream, path, "unpack it"))
    with source:
        try:
            n_rows = sum(batch.num_rows for batch in _arrow_batches(source))
        except pyarrow.ArrowInvalid as error:
            raise SourceError(f"{path} is not an Arrow file: {error}") from error
        for batch in _arrow_batches(source):
            batch = _readable(batch, kept)
            batch = batch.select(_of_schema(batch.schema.names, columns) or batch.schema.names)
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                for item in batch.slice(start, _BATCH_ROWS).to_pylist():
                    yield Row(item, path.stat().st_size / n_rows)


def _arrow_batches(source: Any) -> Iterator[Any]:
    import pyarrow

    source.seek(0)
    if source.read(6) == b"ARROW1":
        reader = pyarrow.ipc.open_file(source)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        source.seek(0)
        yield from pyarrow.ipc.open_stream(source)


def _readable(batch: Any, kept: Sequence[str]) -> Any:
    """Make column names unique, and times integers: Python has no times before year 1 or in nanoseconds.

    In kept columns, times are readable text.
    """
    import pyarrow

    batch = batch.rename_columns(told_apart(batch.schema.names))
    fields = [
        field.with_type(pyarrow.string() if field.name in kept and _has_clock(field.type) else _no_times(field.type))
        for field in batch.schema
    ]
    return batch if fields == list(batch.schema) else batch.cast(pyarrow.schema(fields))


def _has_clock(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_date(kind) or types.is_time(kind) or types.is_timestamp(kind))


def _no_times(kind: Any) -> Any:
    import pyarrow
    from pyarrow import types

    if types.is_date32(kind) or types.is_time32(kind):
        return pyarrow.int32()
    if types.is_timestamp(kind) or types.is_date64(kind) or types.is_time64(kind) or types.is_duration(kind):
        return pyarrow.int64()
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_no_times(field.type)) for field in kind])
    if types.is_list(kind) or types.is_large_list(kind):
        make = pyarrow.list_ if types.is_list(kind) else pyarrow.large_list
        return make(kind.value_field.with_type(_no_times(kind.value_type)))
    return kind
