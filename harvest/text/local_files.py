"""Text from local files and folders.

A .txt or .md file is one document (or one per line or paragraph with `--documents`); .jsonl, .json, .csv, .tsv,
.parquet and .arrow hold a record per document. All of them may be compressed with gzip or zstd.
"""

from __future__ import annotations

import csv
import functools
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import xxhash

from sae_granary.common.errors import one_line
from sae_granary.common.quantities import byte_size
from sae_granary.common.rows import Scalar
from sae_granary.harvest.config import TextConfig
from sae_granary.harvest.errors import SourceError, SourceStoppedError
from sae_granary.harvest.text.columns import SAMPLE_RECORDS, Item, column_kinds, extractor, find_columns
from sae_granary.harvest.text.document import (
    CHAT_NAMES,
    JOINED_NAMES,
    TEXT_NAMES,
    Record,
    Unfit,
    shuffle_name,
    shuffled,
)
from sae_granary.harvest.text.folder import find_files
from sae_granary.harvest.text.formats import COMPRESSED, PLAIN, kind_of, open_binary, text_records
from sae_granary.harvest.text.kept import check_kept, keep, kept_identity
from sae_granary.harvest.text.tables import table_rows

# pyarrow's errors for damaged files and for types that it cannot give are of all these kinds.
_READ_ERRORS = (OSError, EOFError, ValueError, csv.Error, ArithmeticError, LookupError, TypeError, NotImplementedError)
_HASHED_BYTES = 1 << 20  # of each end of a file
_TELL_SECONDS = 10.0


class FileSource:
    """Local files in a fixed order; a document's ordinal counts through all of them."""

    seekable = False

    def __init__(self, config: TextConfig, say: Callable[[str], None] = lambda message: None) -> None:
        self._config, self._say = config, say
        self.name = _printable(config.dataset)
        self._files = find_files(Path(config.dataset), config.split, say)
        self.kinds = {kind_of(path) for path in self._files}  # suffixes
        self._versions = {path: _version(path) for path in self._files}
        self._root = Path(config.dataset) if Path(config.dataset).is_dir() else Path(config.dataset).parent
        self.columns = self._choose_columns()

    @cached_property
    def identity(self) -> Mapping[str, Scalar]:
        """Hashes of every file, and how they are cut into documents; reads all of the text once."""
        return {
            "dataset": "files",
            "dataset_xxh3": _ends_hash(self._root, self._files),
            "dataset_full_xxh3": full_hash(self._root, self._files, self._say),
            "text_columns": ",".join(self.columns),
            **kept_identity(self._config.keep_columns),
            "documents": self._config.documents,
            "shuffle": shuffle_name(self._config),
        }

    def records(self, start: int) -> Iterator[Record]:
        """Every record of every file, shuffled through a buffer when asked."""
        stream = (record for path in self._files for record in self._file_records(path))
        return islice(shuffled(stream, self._config.shuffle_buffer, self._config.shuffle_seed), start, None)

    def n_bytes(self) -> int | None:
        """Size of all files, if none is compressed."""
        if any(path.suffix.lower() in COMPRESSED for path in self._files):
            return None
        return sum(path.stat().st_size for path in self._files)

    def _file_records(self, path: Path) -> Iterator[Record]:
        with _reading(path):
            yield from self._read(path)
        if _version(path) != self._versions[path]:
            raise SourceStoppedError(f"{path} was changed since the harvest began; harvest it when it is finished")

    def _read(self, path: Path) -> Iterator[Record]:
        name = _printable(path.relative_to(self._root).as_posix())
        if kind_of(path) in PLAIN:
            mode = "file" if self._config.documents == "auto" else self._config.documents
            with open_binary(path) as stream:
                for record in text_records(stream, name, mode):
                    if mode == "file" and record.value is Unfit.TOO_LARGE:
                        self._say(f"skipped: {name} is too large for one document; use --documents line or paragraph")
                    yield record
            return
        extract, kept = extractor(self.columns), self._config.keep_columns
        for number, row in enumerate(table_rows(path, self.columns, kept)):
            yield Record(extract(row.item), name, number, row.repaired, row.n_bytes, keep(row.item, kept))

    def _choose_columns(self) -> tuple[str, ...]:
        """The columns of the first table with records; every other table must have them too."""
        tables = [path for path in self._files if kind_of(path) not in PLAIN]
        columns: tuple[str, ...] = ()
        first = None
        for path in tables:
            with _reading(path):
                sample = list(islice(_items(path), SAMPLE_RECORDS))
                kinds = column_kinds(sample)
                if sample and first is None:
                    first = path
                    if kind_of(path) in (".csv", ".tsv") and not self._config.text_columns:
                        _refuse_text_as_header(path, list(kinds))
                    columns = find_columns(functools.partial(_items, path), self._config.text_columns, str(path))
                elif sample and not set(columns) & set(kinds):
                    raise SourceError(
                        f"{path} has no column {columns[0]!r}, the text of {first}; its columns are "
                        f"{', '.join(kinds) or 'none'}: harvest it on its own, or move it out of the folder"
                    )
                if sample:
                    check_kept(functools.partial(_items, path), self._config.keep_columns, str(path))
        if tables and first is None and len(tables) == len(self._files):
            raise SourceError(f"{self._config.dataset} holds no records: give a file with text")
        return columns


def _items(path: Path) -> Iterator[Item]:
    return (row.item for row in table_rows(path))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Inside, a file that cannot be read is an error of the source. What was committed before stays."""
    try:
        yield
    except _READ_ERRORS as error:
        problem, remedy = one_line(error), "fix or remove it"
        if "too much memory" in problem:  # zstd's window
            remedy = f"decompress it first: zstd -d --long=31 {shlex.quote(str(path))}"
        raise SourceStoppedError(f"{path} cannot be read: {problem}; {remedy}") from error
    except MemoryError as error:
        raise SourceStoppedError(f"{path} needs more memory than there is; split it, or remove it") from error


def _refuse_text_as_header(path: Path, columns: list[str]) -> None:
    """Of a table with one column: its first line must be a name that is known, or it may be the first text."""
    known = {*TEXT_NAMES, *CHAT_NAMES, *chain(*JOINED_NAMES)}
    if len(columns) == 1 and columns[0].strip().lower() not in known:
        raise SourceError(
            f"{path} has one column, and its first line {columns[0][:60]!r} may be a name or the first text: name it "
            "with --text-column, or put a line with the name text above it"
        )


def _printable(name: str) -> str:
    """A file name with its bytes that are no UTF-8 written as \\xe9."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _version(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _ends_hash(root: Path, files: list[Path]) -> str:
    """Names, sizes and both ends of every file: what caches of earlier versions know."""
    digest = xxhash.xxh3_128()
    for path in files:
        size = path.stat().st_size
        digest.update(_file_key(root, path, size))
        with path.open("rb") as stream:
            digest.update(stream.read(_HASHED_BYTES))
            stream.seek(max(0, size - _HASHED_BYTES))
            digest.update(stream.read(_HASHED_BYTES))
    return digest.hexdigest()


def full_hash(root: Path, files: list[Path], say: Callable[[str], None]) -> str:
    """Names, sizes and all bytes of every file, as fast as the disk reads; says how far it is where that takes long."""
    digest = xxhash.xxh3_128()
    total, done, told = sum(path.stat().st_size for path in files), 0, time.monotonic()
    for path in files:
        digest.update(_file_key(root, path, path.stat().st_size))
        with path.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
                done += len(block)
                if time.monotonic() - told > _TELL_SECONDS:
                    told = time.monotonic()
                    say(f"hashing the text: {byte_size(done)} of {byte_size(total)}")
    return digest.hexdigest()


def _file_key(root: Path, path: Path, size: int) -> bytes:
    return os.fsencode(path.relative_to(root).as_posix()) + f"\0{size}\0".encode()
