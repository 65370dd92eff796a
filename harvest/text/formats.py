"""Formats of local text files: suffixes, plain text, and reading in bounded pieces.

Only a plain file that is one document, and a .json file that is one array, are read whole.
"""

from __future__ import annotations

import codecs
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from sae_granary.harvest.text.document import MAX_RECORD_BYTES, Record, Unfit

PLAIN = (".txt", ".md", ".text")
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")
MAX_WHOLE_BYTES = 1 << 30  # of a file that is read whole, unpacked


def text_records(stream: IO[bytes], name: str, mode: str) -> Iterator[Record]:
    """The documents of a stream of text: one per file, line or paragraph."""
    for row, (data, n_bytes) in enumerate(_split(stream, mode)):
        text, repaired = (data, False) if isinstance(data, Unfit) else decode(data)
        yield Record(text, name, row, repaired, n_bytes)


def _split(stream: IO[bytes], mode: str) -> Iterator[tuple[bytes | Unfit, int]]:
    """(text, size in bytes) per file, line or paragraph (separated by blank lines)."""
    if mode == "file":
        data = stream.read(MAX_RECORD_BYTES + 1)
        yield (data if len(data) <= MAX_RECORD_BYTES else Unfit.TOO_LARGE), len(data)
        return
    paragraph: list[bytes] = []
    n_bytes = 0
    for line, size in bounded_lines(stream):
        if mode == "line":
            yield (line if isinstance(line, Unfit) else line.rstrip(b"\r\n")), size
        elif isinstance(line, Unfit) or line.strip():
            n_bytes += size
            if isinstance(line, Unfit) or n_bytes >= MAX_RECORD_BYTES:
                paragraph.clear()
            else:
                paragraph.append(line)
        elif n_bytes:
            yield (b"".join(paragraph) if n_bytes < MAX_RECORD_BYTES else Unfit.TOO_LARGE), n_bytes
            paragraph, n_bytes = [], 0
    if n_bytes:
        yield (b"".join(paragraph) if n_bytes < MAX_RECORD_BYTES else Unfit.TOO_LARGE), n_bytes


def bounded_lines(stream: IO[bytes]) -> Iterator[tuple[bytes | Unfit, int]]:
    """(line with its ending, size in bytes); a line above MAX_RECORD_BYTES is only reported as too large."""
    while line := stream.readline(MAX_RECORD_BYTES):
        size = len(line)
        if size < MAX_RECORD_BYTES or line.endswith(b"\n"):
            yield line, size
            continue
        while not line.endswith(b"\n") and (line := stream.readline(1 << 20)):
            size += len(line)
        yield Unfit.TOO_LARGE, size


def open_binary(path: Path) -> IO[bytes]:
    """Open a file, decompressed by its suffix; a UTF-16 file with a byte order mark is read as UTF-8."""
    stream = _open_bytes(path)
    if stream.peek(2)[:2] not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return stream
    with stream:
        data = stream.read(MAX_WHOLE_BYTES)
    try:
        return io.BytesIO(data.decode("utf-16").encode())
    except UnicodeDecodeError:  # no text, or too long
        return _open_bytes(path)


def _open_bytes(path: Path) -> io.BufferedReader:
    if path.suffix.lower() not in COMPRESSED:
        return path.open("rb")
    import pyarrow

    codec = {".gz": "gzip", ".zst": "zstd"}[path.suffix.lower()]
    stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), codec)
    return io.BufferedReader(stream)  # pyarrow's own readline is slow


def kind_of(path: Path) -> str:
    """The suffix that determines the format, without that of the compression."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED else path.suffix.lower()


def known_suffixes() -> str:
    """The suffixes, for messages."""
    return ", ".join(PLAIN + TABLES)


def decode(data: bytes) -> tuple[str, bool]:
    """(text, whether invalid UTF-8 bytes were replaced)."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8"), False
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace"), True


def json_object(text: str) -> dict[str, Any] | None:
    """A JSON object, or None for anything else."""
    try:
        value = json.loads(text, object_pairs_hook=told_apart_pairs)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def again(name: str) -> str:
    """New name of the second column with a name."""
    return f"{name} (2)"


def told_apart(names: Sequence[str]) -> list[str]:
    """Column names made unique: the second `text` is `text (2)`."""
    counts: Counter[str] = Counter()
    found = []
    for name in names:
        counts[name] += 1
        found.append(name if counts[name] == 1 else f"{name} ({counts[name]})")
    return found


def told_apart_pairs(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which a key that occurs twice becomes two columns."""
    found = dict(pairs)
    if len(found) != len(pairs):
        found = dict(zip(told_apart([key for key, _ in pairs]), (value for _, value in pairs), strict=True))
    return found
