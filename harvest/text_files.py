"""Text from local files, folders and standard input.

A .txt or .md file is one document (or one per line or paragraph with `--documents`); .jsonl, .json, .csv and .parquet
hold a record per document. All of them may be compressed with gzip or zstd. Nothing is read whole except a .txt or
.md file that is one document, and a .json file that is one array.
"""

from __future__ import annotations

import csv
import io
import json
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

from harvest.columns import SAMPLE_RECORDS, choose_columns, column_kinds, extractor
from harvest.config import TextConfig
from harvest.errors import SourceError
from harvest.text import Record, Scalar

PLAIN = (".txt", ".md", ".text")
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".zst")
_HASHED_BYTES = 1 << 20  # of each end of a file
_BATCH_ROWS = 1024  # parquet rows read at a time


class FileSource:
    """Local files in a fixed order; a document's ordinal counts through all of them."""

    def __init__(self, config: TextConfig) -> None:
        self._config = config
        self._files = find_files(Path(config.dataset))
        self._root = Path(config.dataset) if Path(config.dataset).is_dir() else Path(config.dataset).parent
        self.columns = self._choose_columns()

    @property
    def name(self) -> str:
        """The path as it was given."""
        return self._config.dataset

    @property
    def identity(self) -> Mapping[str, Scalar]:
        """A hash over names, sizes and both ends of every file, and how they are cut into documents."""
        return {
            "dataset": "files",
            "dataset_xxh3": _files_hash(self._root, self._files),
            "text_columns": ",".join(self.columns),
            "documents": self._config.documents,
            "shuffle": shuffle_name(self._config),
        }

    def records(self, start: int) -> Iterator[Record]:
        """Every record of every file, shuffled through a buffer when asked."""
        stream = (record for path in self._files for record in self._file_records(path))
        return islice(shuffled(stream, self._config.shuffle_buffer, self._config.shuffle_seed), start, None)

    def n_bytes(self) -> int | None:
        """Size of all files, if none is compressed or binary."""
        if any(_kind(path) == ".parquet" or path.suffix.lower() in COMPRESSED for path in self._files):
            return None
        return sum(path.stat().st_size for path in self._files)

    def _file_records(self, path: Path) -> Iterator[Record]:
        name = path.relative_to(self._root).as_posix()
        if _kind(path) in PLAIN:
            mode = "file" if self._config.documents == "auto" else self._config.documents
            yield from plain_records(path, name, mode)
            return
        extract = extractor(self.columns)
        for row, item in enumerate(table_records(path)):
            yield Record(extract(item), name, row)

    def _choose_columns(self) -> tuple[str, ...]:
        tables = [path for path in self._files if _kind(path) not in PLAIN]
        if not tables:
            return ()
        kinds = column_kinds(islice(table_records(tables[0]), SAMPLE_RECORDS))
        if not kinds:
            raise SourceError(f"{tables[0]} holds no records")
        return choose_columns(kinds, self._config.text_columns, str(tables[0]))


class StdinSource:
    """One document per line of standard input (or per paragraph, or all of it); JSON lines when the first is JSON."""

    columns: tuple[str, ...] = ()

    def __init__(self, config: TextConfig, stream: IO[bytes] | None = None) -> None:
        self._config = config
        self._stream = stream if stream is not None else sys.stdin.buffer

    @property
    def name(self) -> str:
        """As it is typed."""
        return "-"

    @property
    def identity(self) -> Mapping[str, Scalar]:
        """A pipe cannot be looked at twice: that the same text comes again is the caller's promise."""
        return {
            "dataset": "standard input",
            "text_columns": ",".join(self._config.text_columns),
            "documents": self._config.documents,
            "shuffle": shuffle_name(self._config),
        }

    def records(self, start: int) -> Iterator[Record]:
        """The documents of the stream from ordinal `start` on."""
        stream = shuffled(self._all(), self._config.shuffle_buffer, self._config.shuffle_seed)
        return islice(stream, start, None)

    def n_bytes(self) -> int | None:
        """Not known."""
        return None

    def _all(self) -> Iterator[Record]:
        mode = "line" if self._config.documents == "auto" else self._config.documents
        texts = split_text(self._stream, mode)
        first = next(texts, None)
        if first is None:
            return
        head = _json_object(first[0]) if mode == "line" else None
        lines = _chain(first, texts)
        if head is None:
            for row, (text, repaired) in enumerate(lines):
                yield Record(text, "stdin", row, repaired)
            return
        extract = extractor(choose_columns(column_kinds([head]), self._config.text_columns, "standard input"))
        for row, (text, repaired) in enumerate(lines):
            item = _json_object(text)
            yield Record(extract(item) if item is not None else None, "stdin", row, repaired)


def find_files(path: Path) -> list[Path]:
    """A file itself, or every readable file below a folder, sorted by its path."""
    if path.is_file():
        if _kind(path) not in PLAIN + TABLES:
            raise SourceError(f"{path} is not a text file known here: {_known()}, also with .gz or .zst")
        return [path]
    hidden = lambda file: any(part.startswith(".") for part in file.relative_to(path).parts)  # noqa: E731
    files = [file for file in path.rglob("*") if file.is_file() and _kind(file) in PLAIN + TABLES and not hidden(file)]
    if not files:
        raise SourceError(f"the folder {path} holds no {_known()} files")
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def plain_records(path: Path, name: str, mode: str) -> Iterator[Record]:
    """The documents of a .txt or .md file."""
    with open_binary(path) as stream:
        for row, (text, repaired) in enumerate(split_text(stream, mode)):
            yield Record(text, name, row, repaired)


def split_text(stream: IO[bytes], mode: str) -> Iterator[tuple[str, bool]]:
    """(text, whether bytes were replaced) per file, line or paragraph (parted by blank lines)."""
    if mode == "file":
        yield _decode(stream.read())
        return
    paragraph: list[bytes] = []
    for line in stream:
        if mode == "line":
            yield _decode(line.rstrip(b"\r\n"))
        elif line.strip():
            paragraph.append(line)
        elif paragraph:
            yield _decode(b"".join(paragraph))
            paragraph = []
    if paragraph:
        yield _decode(b"".join(paragraph))


def table_records(path: Path) -> Iterator[Mapping[str, Any]]:
    """The records of a .jsonl, .json, .csv, .tsv or .parquet file. A line that is no JSON counts as a None."""
    kind = _kind(path)
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
                    yield _json_object(_decode(line)[0]) or {}


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


def shuffled(records: Iterable[Record], buffer_size: int, seed: int) -> Iterator[Record]:
    """Draw from a buffer that is filled up again; a function of the records, the size and the seed only."""
    if buffer_size < 2:
        yield from records
        return
    draw = random.Random(seed)
    buffer: list[Record] = []
    for record in records:
        if len(buffer) < buffer_size:
            buffer.append(record)
            continue
        index = draw.randrange(buffer_size)
        buffer[index], record = record, buffer[index]
        yield record
    draw.shuffle(buffer)
    yield from buffer


def shuffle_name(config: TextConfig) -> str:
    """How the stream is shuffled, for the fingerprint."""
    return f"buffer {config.shuffle_buffer}, seed {config.shuffle_seed}" if config.shuffle_buffer > 1 else "none"


def _kind(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED else path.suffix.lower()


def _known() -> str:
    return ", ".join(PLAIN + TABLES)


def _decode(data: bytes) -> tuple[str, bool]:
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8"), False
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace"), True


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _json_records(stream: IO[bytes], path: Path) -> Iterator[Mapping[str, Any]]:
    """One array of objects, one object that holds such an array, or JSON lines under the name .json."""
    data = stream.read()
    try:
        value = json.loads(_decode(data)[0])
    except ValueError:
        for line in data.splitlines():
            if line.strip():
                yield _json_object(_decode(line)[0]) or {}
        return
    if isinstance(value, dict):
        arrays = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
        value = arrays[0] if len(arrays) == 1 else [value]
    if not isinstance(value, list):
        raise SourceError(f"{path} is JSON but neither an object nor an array of objects")
    yield from (item if isinstance(item, dict) else {} for item in value)


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


def _files_hash(root: Path, files: list[Path]) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root).as_posix()}\0{size}\0".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(_HASHED_BYTES))
            stream.seek(max(0, size - _HASHED_BYTES))
            digest.update(stream.read(_HASHED_BYTES))
    return digest.hexdigest()


def _chain(first: tuple[str, bool], rest: Iterator[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    yield first
    yield from rest
