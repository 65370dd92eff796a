"""The formats of local text files: plain text, JSON, CSV and parquet, also compressed with gzip or zstd.

Nothing is read whole except a plain file that is one document, and a .json file that is one array.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from sae_granary.harvest.errors import SourceError
from sae_granary.harvest.text.document import Record

PLAIN = (".txt", ".md", ".text")
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".zst")
_BATCH_ROWS = 1024  # parquet rows read at a time


def plain_records(path: Path, name: str, mode: str) -> Iterator[Record]:
    """The documents of a .txt or .md file."""
    with open_binary(path) as stream:
        for row, (text, repaired) in enumerate(split_text(stream, mode)):
            yield Record(text, name, row, repaired)


def split_text(stream: IO[bytes], mode: str) -> Iterator[tuple[str, bool]]:
    """(text, whether bytes were replaced) per file, line or paragraph (parted by blank lines)."""
    if mode == "file":
        yield decode(stream.read())
        return
    paragraph: list[bytes] = []
    for line in stream:
        if mode == "line":
            yield decode(line.rstrip(b"\r\n"))
        elif line.strip():
            paragraph.append(line)
        elif paragraph:
            yield decode(b"".join(paragraph))
            paragraph = []
    if paragraph:
        yield decode(b"".join(paragraph))


def table_records(path: Path) -> Iterator[Mapping[str, Any] | None]:
    """The records of a .jsonl, .json, .csv, .tsv or .parquet file; None for one that is no JSON object."""
    kind = kind_of(path)
    if kind == ".parquet":
        yield from _parquet_records(path)
        return
    with open_binary(path) as stream:
        if kind in (".csv", ".tsv"):
            csv.field_size_limit(sys.maxsize)
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")
            yield from csv.DictReader(text, delimiter="\t" if kind == ".tsv" else ",")
        elif kind == ".json":
            yield from _json_records(stream, path)
        else:
            for line in stream:
                if line.strip():
                    yield json_object(decode(line)[0])


def open_binary(path: Path) -> IO[bytes]:
    """A file for reading, decompressed by its suffix."""
    if path.suffix.lower() not in COMPRESSED:
        return path.open("rb")
    import pyarrow

    codec = {".gz": "gzip", ".zst": "zstd"}[path.suffix.lower()]
    stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), codec)
    return io.BufferedReader(_RawStream(stream))  # pyarrow's own readline is slow


class _RawStream(io.RawIOBase):
    """A pyarrow stream as a raw Python stream."""

    def __init__(self, stream: Any) -> None:
        self._inner = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._inner.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._inner.close()
        super().close()


def kind_of(path: Path) -> str:
    """The suffix that tells the format, less that of a compression."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED else path.suffix.lower()


def known_suffixes() -> str:
    """For messages."""
    return ", ".join(PLAIN + TABLES)


def decode(data: bytes) -> tuple[str, bool]:
    """(text, whether bytes that are no UTF-8 were replaced)."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8"), False
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace"), True


def json_object(text: str) -> dict[str, Any] | None:
    """A JSON object, or None for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _json_records(stream: IO[bytes], path: Path) -> Iterator[Mapping[str, Any] | None]:
    """One array of objects, one object that holds such an array, or JSON lines under the name .json."""
    data = stream.read()
    try:
        value = json.loads(decode(data)[0])
    except (ValueError, RecursionError) as error:
        objects = [json_object(decode(line)[0]) for line in data.splitlines() if line.strip()]
        if objects and (data.lstrip().startswith(b"[") or all(item is None for item in objects)):
            raise SourceError(f"{path} is invalid JSON: {error}; mend or remove it") from error
        yield from objects
        return
    if isinstance(value, dict):
        arrays = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
        value = arrays[0] if len(arrays) == 1 else [value]
    if not isinstance(value, list):
        raise SourceError(f"{path} is JSON but neither an object nor an array of objects")
    yield from (item if isinstance(item, dict) else None for item in value)


def _parquet_records(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    with open_binary(path) as stream:
        source = stream if path.suffix.lower() == ".parquet" else io.BytesIO(stream.read())
        try:
            file = pyarrow.parquet.ParquetFile(source)
        except pyarrow.ArrowInvalid as error:
            raise SourceError(f"{path} is no parquet file: {error}") from error
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            yield from batch.to_pylist()
