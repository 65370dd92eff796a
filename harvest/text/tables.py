"""Files of records with columns: JSON lines, JSON, CSV, TSV, Parquet and Arrow."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

from sae_granary.common.quantities import byte_size
from sae_granary.harvest.errors import SourceError
from sae_granary.harvest.text.arrow_tables import Row, arrow_rows, parquet_rows, read_whole
from sae_granary.harvest.text.columns import Item
from sae_granary.harvest.text.document import MAX_RECORD_BYTES, Unfit
from sae_granary.harvest.text.formats import (
    bounded_lines,
    decode,
    json_object,
    kind_of,
    open_binary,
    told_apart,
    told_apart_pairs,
)

_CR = "\udc0d"  # replaces CR inside a line, which the module csv takes for its end; no decoder gives it
_DELIMITERS = (",", ";", "\t", "|")  # of a .csv; the first of those that divide its header most often


def table_rows(path: Path, columns: Sequence[str] = (), kept: Sequence[str] = ()) -> Iterator[Row]:
    """The records of a .jsonl, .json, .csv, .tsv, .parquet or .arrow file. Raises SourceError.

    Of the last two only `columns` and `kept` are read, if any `columns` are named; times in `kept` are text.
    """
    wanted = (*columns, *kept) if columns else ()
    kind = kind_of(path)
    with open_binary(path) as stream:
        if kind == ".parquet":
            yield from parquet_rows(stream, path, wanted, kept)
        elif kind == ".arrow":
            yield from arrow_rows(stream, path, wanted, kept)
        elif kind in (".csv", ".tsv"):
            newline = "" if _ends_lines_with_cr(path) else "\n"
            with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as lines:
                yield from _csv_rows(_TextLines(lines, path), path, tabs=kind == ".tsv")
        elif kind == ".json":
            yield from _json_rows(stream, path)
        else:
            for line, n_bytes in bounded_lines(stream):
                if isinstance(line, Unfit):
                    yield Row(line, n_bytes)
                elif line.strip():
                    text, repaired = decode(line)
                    yield Row(_object(text), n_bytes, repaired)


def _object(text: str) -> Item:
    item = json_object(text)
    return Unfit.NOT_JSON if item is None else item


def _ends_lines_with_cr(path: Path) -> bool:
    """Whether its header is followed by CR alone, as in old files of a Mac; else CR inside of a line is text."""
    with open_binary(path) as stream:
        return b"\r" in stream.readline(MAX_RECORD_BYTES).rstrip(b"\r\n")


def _csv_rows(lines: _TextLines, path: Path, *, tabs: bool) -> Iterator[Row]:
    """A .tsv has no quotes, as such files are written; a quote in a .csv must be closed, or records would vanish in it.

    Records with more filled cells than there are columns are unfit: a delimiter inside of a cell is not quoted.
    """
    csv.field_size_limit(MAX_RECORD_BYTES)
    head = next((line for line in lines if line.strip()), "")
    if tabs:
        delimiter = "\t"
    elif named := re.fullmatch(r'"?sep=(.)"?\s*', head):  # as Excel writes it
        delimiter, head = named[1], next(lines, "")
    else:
        bare = re.sub(r'"[^"]*"', "", head)
        delimiter = max(_DELIMITERS, key=bare.count)
    quoting: Any = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    reader = csv.reader(chain([head] if head else [], lines), delimiter=delimiter, quoting=quoting, strict=not tabs)
    header: list[str] | None = None
    while True:
        begin = lines.number + (header is not None)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise SourceError(
                f"{path}: the record that begins in line {begin} is not CSV ({error}): its quote is not closed; "
                'close it, write quotes inside of a quoted cell twice (""), or remove the record'
            ) from error
        if cells is None:
            return
        n_bytes, repaired = lines.taken()
        cells = [cell.replace(_CR, "\r") for cell in cells]
        if header is None:
            header = told_apart(cells)
        elif any(cells[len(header) :]):
            yield Row(Unfit.MALFORMED, n_bytes)
        elif cells:
            cells += [None] * (len(header) - len(cells))  # type: ignore[list-item]
            yield Row(dict(zip(header, cells, strict=False)), n_bytes, repaired)


class _TextLines:
    """Lines of a stream that was decoded with surrogateescape, counted."""

    def __init__(self, text: IO[str], path: Path) -> None:
        self._text, self._path = text, path
        self.number = 0  # of the last line given, from 1
        self._n_bytes, self._repaired = 0, False

    def __iter__(self) -> _TextLines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(MAX_RECORD_BYTES)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) == MAX_RECORD_BYTES:
            raise SourceError(f"{self._path}: line {self.number} is longer than {byte_size(len(line))}; remove it")
        try:
            data = line.encode()
        except UnicodeEncodeError:
            data = line.encode("utf-8", "surrogateescape")
            line, self._repaired = data.decode("utf-8", "replace"), True
        self._n_bytes += len(data)
        body = line.rstrip("\r\n")
        return body.replace("\r", _CR) + line[len(body) :]

    def taken(self) -> tuple[int, bool]:
        """(bytes, whether any were replaced) of the lines since the last call."""
        found = self._n_bytes, self._repaired
        self._n_bytes, self._repaired = 0, False
        return found


def _json_rows(stream: IO[bytes], path: Path) -> Iterator[Row]:
    """One array of objects, one object that holds such an array or columns, or JSON lines under the name .json."""
    data = read_whole(stream, path, "write it as JSON lines (.jsonl)")
    items: list[Item]
    try:
        value = json.loads(decode(data)[0], object_pairs_hook=told_apart_pairs)
    except (ValueError, RecursionError) as error:
        items = [_object(decode(line)[0]) for line in data.splitlines() if line.strip()]
        if items and (data.lstrip().startswith(b"[") or all(isinstance(item, Unfit) for item in items)):
            raise SourceError(f"{path} is invalid JSON: {error}; fix or remove it") from error
    else:
        if isinstance(value, dict):
            value = _records_of(value)
        if not isinstance(value, list):
            raise SourceError(f"{path} is JSON but neither an object nor an array of objects")
        items = [item if isinstance(item, dict) else Unfit.NOT_JSON for item in value]
    for item in items:
        yield Row(item, len(data) / len(items))


def _records_of(value: dict[str, Any]) -> list[Any]:
    """The records of one object: an array in it, its columns, a table as pandas splits it, or the object itself."""
    arrays = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if len(arrays) == 1:
        return arrays[0]
    lists = [item for item in value.values() if isinstance(item, list)]
    if value.keys() == {"columns", "index", "data"} and len(lists) == 3:
        return [dict(zip(value["columns"], cells, strict=False)) for cells in value["data"]]
    if not arrays and len(lists) == len(value) and len({len(item) for item in lists}) == 1:
        return [dict(zip(value, cells, strict=True)) for cells in zip(*lists, strict=True)]
    return [value]
