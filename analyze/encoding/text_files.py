"""A file of texts, or standard input -> documents: one text per line, JSON lines, CSV or TSV."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import IO, Any

from sae_granary.common.errors import ConfigError
from sae_granary.common.files import home_path
from sae_granary.models.tokens.document import Document, text_document

LINES, JSON_LINES, TABLES = (".txt", ".md", ".text", ""), (".jsonl", ".ndjson"), (".csv", ".tsv")
TEXT_NAMES = ("text", "content", "sentence", "document", "body")  # of the column, where none is named
MAX_CELL = 2**28  # characters


def read_texts(name: str, column: str | None = None, stdin: IO[bytes] | None = None) -> Iterator[Document]:
    """The texts of a file, or of standard input for `-`, numbered from 0 as a harvest of the file numbers them.

    Lines are one text each; with `column`, those of standard input are JSON objects. A text that is empty, binary or no
    string is a document that is skipped. Raises ConfigError for a missing file, another format, a line that is not
    JSON, a column that is not there.
    """
    path, kind = home_path(name), Path(name).suffix.lower()
    if name == "-":
        kind = JSON_LINES[0] if column is not None else LINES[0]
    elif not path.exists() or path.is_dir():  # a FIFO is fine: --texts <(command)
        raise ConfigError(f"--texts {name}: no such file; expected one text per line, .jsonl, .csv, or - for stdin")
    elif kind not in (*LINES, *JSON_LINES, *TABLES):
        known = ", ".join(kind for kind in (*LINES, *JSON_LINES, *TABLES) if kind)
        raise ConfigError(f"--texts {name}: {kind} is not read here, expected {known}; `sae-harvest` reads more")
    if kind in LINES and column is not None:
        raise ConfigError(f"--text-column is {column!r}, but {name} holds lines without columns: leave it out")
    documents = _documents(name, kind, column, stdin)
    first = next(documents, None)  # now, so that what is wrong with the file is said before the model is loaded
    return chain([first] if first is not None else [], documents)


def _documents(name: str, kind: str, column: str | None, stdin: IO[bytes] | None) -> Iterator[Document]:
    source = "stdin" if name == "-" else name
    opened = nullcontext(stdin or sys.stdin.buffer) if name == "-" else home_path(name).open("rb")
    with opened as stream:
        lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="" if kind in TABLES else "\n")
        try:
            for i, value in enumerate(_values(lines, kind, column, source)):
                if isinstance(value, str):
                    yield text_document(i, value, source, i)
                else:
                    yield Document(i, "", source, i, skipped="none" if value is None else "not_text")
        finally:
            lines.detach()


def _values(lines: IO[str], kind: str, column: str | None, source: str) -> Iterator[object]:
    if kind in LINES:
        yield from (line.rstrip("\r\n") for line in lines)
        return
    records = _objects(lines, source) if kind in JSON_LINES else _table(lines, source, tabs=kind == ".tsv")
    first = next(records, None)
    if first is None:
        return
    name = _column_of(first, column, source)
    yield from (record.get(name) for record in chain([first], records))


def _objects(lines: Iterable[str], source: str) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise ConfigError(f"{source}, line {number}: {line.strip()[:40]!r}, expected a JSON object in each line")
        yield value


def _table(lines: IO[str], source: str, *, tabs: bool) -> Iterator[Mapping[str, Any]]:
    head = lines.readline()
    delimiter = "\t" if tabs else max((",", ";", "\t", "|"), key=head.count)
    csv.field_size_limit(MAX_CELL)
    reader: csv.DictReader[str] = csv.DictReader(chain([head] if head else [], lines), delimiter=delimiter)
    try:
        yield from reader
    except csv.Error as error:
        raise ConfigError(f"{source}, line {reader.line_num + 1} is not CSV: {error}; correct or remove it") from None


def _column_of(record: Mapping[str, Any], column: str | None, source: str) -> str:
    there = [name for name in record if isinstance(name, str)]
    if column is not None:
        if column not in record:
            raise ConfigError(f"--text-column is {column!r}: {source} has the columns {', '.join(there)}")
        return column
    usual = [name for name in TEXT_NAMES if name in record] or (there if len(there) == 1 else [])
    if not usual:
        raise ConfigError(f"{source} has the columns {', '.join(there)}: name that of the text with --text-column")
    return usual[0]
