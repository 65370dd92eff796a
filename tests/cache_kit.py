"""A toy harvest for the tests of the cache: deterministic rows from a numbered source, and how a harvest resumes."""

import ctypes
import hashlib
import json
import mmap
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from command_kit import WIDE, invoke

from sae_granary.cache.cli import app
from sae_granary.cache.format.layout import COLUMNS
from sae_granary.cache.format.signed import dump_signed
from sae_granary.cache.format.spec import CacheSpec
from sae_granary.cache.write.writer import CacheWriter
from sae_granary.common.rows import FLAG_SPECIAL, FLAG_WINDOW_START, DocumentRow, HookPoint, Rows

N_BUFFERS = 6
DOCS_PER_BUFFER = 4
WORDS = ["[PAD]", "[CLS]", "[SEP]", "hello", "##s", "world", "cats", "and", "dogs", "<script>"]
TYPES = {name: storage.numpy for name, storage in COLUMNS.items()}
run_cache = partial(invoke, app, env=WIDE)

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def toy_spec(dtype="bfloat16", hooks=("layer_1", "layer_3"), d_in=8, rows_per_shard=64, **changes):
    options = {
        "unit": "token",
        "hook_points": tuple(HookPoint(name, f"encoder.{name}", "output", 0, d_in) for name in hooks),
        "dtype": dtype,
        "rows_per_shard": rows_per_shard,
        "provenance": {"model": {"id": "toy", "revision": "abcdef"}, "dataset": {"id": "toy-text"}},
        "fingerprint": {"model": "toy", "weights": "0123", "dataset": "toy-text"},
        "vocabulary": WORDS,
        "inner_chunk_bytes": 256,
    }
    return CacheSpec(**(options | changes))


def toy_buffer(number: int, hooks=("layer_1", "layer_3"), d_in=8, dtype=np.float32) -> tuple[Rows, list[DocumentRow]]:
    """Documents of one to three windows of 3 to 12 rows; some ordinals are skipped, as harvests do."""
    rng = np.random.default_rng(number)
    parts, documents, window = [], [], number * DOCS_PER_BUFFER * 3
    for i in range(DOCS_PER_BUFFER):
        doc_id = 2 * (number * DOCS_PER_BUFFER + i)
        documents.append(DocumentRow(doc_id, "toy.txt", doc_id, f"document {doc_id} says ünïcode"))
        taken = 0
        for _ in range(int(rng.integers(1, 4))):
            n = int(rng.integers(3, 13))
            special = np.zeros(n, dtype=bool)
            special[[0, -1]] = True
            token_id = np.where(special, 1, rng.integers(3, len(WORDS), size=n))
            doc_position = np.where(special, -1, taken + np.arange(n) - 1)
            flags = special * FLAG_SPECIAL + (np.arange(n) == 0) * FLAG_WINDOW_START
            parts.append((token_id, np.full(n, doc_id), np.full(n, window), np.arange(n), doc_position, flags))
            taken, window = taken + n - 2, window + 1
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    values = {name: (rng.normal(size=(len(columns[0]), d_in)) * (k + 1)).astype(dtype) for k, name in enumerate(hooks)}
    return make_rows(values, **dict(zip(TYPES, columns, strict=True))), documents


def make_rows(values: dict[str, np.ndarray], **columns: object) -> Rows:
    """Rows of these activations; columns that are not given are 0."""
    n_rows = len(next(iter(values.values())))
    given = {name: np.asarray(columns.get(name, np.zeros(n_rows))).astype(kind) for name, kind in TYPES.items()}
    return Rows(values, **given)


def toy_rows(n_buffers: int = N_BUFFERS, **options) -> Rows:
    """What a whole harvest appends, as one."""
    buffers = [toy_buffer(i, **options)[0] for i in range(n_buffers)]
    join = lambda get: np.concatenate([get(rows) for rows in buffers])  # noqa: E731
    values = {hook: join(lambda r, h=hook: r.activations[h]) for hook in buffers[0].activations}
    return Rows(values, *(join(lambda r, n=name: getattr(r, n)) for name in TYPES))


def interrupted(path: Path, spec: CacheSpec | None = None, after: int = 100) -> Path:
    """A harvest that is stopped when more than so many rows were given to it."""

    def stop(n_rows: int) -> None:
        if n_rows > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harvest(path, spec, before_append=stop)
    return path


def harvest(
    path: Path,
    spec: CacheSpec | None = None,
    n_buffers: int = N_BUFFERS,
    before_append: Callable[[int], None] = lambda n_rows: None,
) -> None:
    """Harvest the toy source, from the start or from where an earlier call was stopped."""
    spec = spec or toy_spec()
    hooks = tuple(hook.name for hook in spec.hook_points)
    with CacheWriter.open(path, spec) as writer:
        if writer.complete:
            return
        cursor = writer.cursor
        first = cursor.source["buffer"] if cursor else 0
        for number in range(first, n_buffers):
            rows, documents = toy_buffer(number, hooks, spec.hook_points[0].d_in)
            writer.begin_buffer({"buffer": number})
            if cursor and number == first:
                writer.skip(cursor.rows_into_buffer)
                rows = rows[cursor.rows_into_buffer :]
                documents = [d for d in documents if d.doc_id in rows.doc_id]
            cuts = [*np.flatnonzero(np.diff(rows.window.astype(np.int64))) + 1, rows.n_rows]
            start = 0
            for stop in cuts[1 + number % 2 :: 2 + number % 2] + cuts[-1:]:  # several windows per call
                part = rows[start:stop]
                if part.n_rows:
                    before_append(writer.n_rows)
                    here = set(part.doc_id.tolist()) - set(rows.doc_id[:start].tolist())
                    writer.append(part, [d for d in documents if d.doc_id in here])
                start = max(start, stop)
        writer.finish({"documents": n_buffers * DOCS_PER_BUFFER})


def tree(path: Path) -> dict[str, str]:
    """Every file and folder below a path, with a checksum of its content."""
    return {
        str(item.relative_to(path)): hashlib.md5(item.read_bytes()).hexdigest() if item.is_file() else "folder"
        for item in sorted(path.rglob("*"))
    }


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a path but those that tell how it was made."""
    files = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return {name: data for name, data in files.items() if name not in ("harvest.log", "about.json")}


def flip(file: Path, at: int = 100) -> None:
    """Change a bit of a file; another name of it keeps what it has."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.unlink()
    file.write_bytes(data)


def edit_signed(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a signed file and sign it again, as a hostile writer could."""
    body = json.loads(file.read_bytes())
    del body["xxh3"]
    change(body)
    file.write_bytes(dump_signed(body))


def begins_in_memory(path) -> bool:
    """Whether the first page of a file is in the page cache. A read that may not wait would start reading it."""
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), mmap.PAGESIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    first, resident = ctypes.c_char.from_buffer(memory), ctypes.c_ubyte()
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(1), ctypes.byref(resident))
    assert not failed, os.strerror(ctypes.get_errno())
    return bool(resident.value & 1)
