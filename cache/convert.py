"""A cache stored again in another dtype: the same rows, documents and positions, shard by shard.

Memory is bounded by a block of rows. A conversion that was interrupted continues after its last committed shard, to the
same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_granary.cache.errors import CacheError, CorruptCacheError, DiskFullError, SpecError
from sae_granary.cache.format.documents import hash_file, read_doc_ids, read_document
from sae_granary.cache.format.layout import ADDED, COLUMNS, cache_layout, documents_path
from sae_granary.cache.format.manifest import ShardRecord
from sae_granary.cache.format.records import existing_manifest
from sae_granary.cache.format.spec import CacheSpec
from sae_granary.cache.format.storage import STORAGE
from sae_granary.cache.read.check import check_file
from sae_granary.cache.read.listing import bytes_in
from sae_granary.cache.read.reader import Cache, open_local
from sae_granary.cache.read.verify import verify
from sae_granary.cache.write.calibrate import MAX_ROWS, MIN_ROWS
from sae_granary.cache.write.writer import CacheWriter
from sae_granary.common.files import free_bytes
from sae_granary.common.rows import DocumentRow, Rows

BLOCK_BYTES = 256 << 20  # of rows as float32
CONVERTED = "converted_from"  # in the fingerprint: the dtypes that the rows were stored in before


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    dtype: str,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda message: None,
) -> Cache:
    """Store a complete cache again as `dtype` in the folder `target`, and verify the result; the same again continues.

    Where the source was extended since, the new shards are added. Hook points that were added to it are added to
    the new cache.

    Checksums of the source are checked on the way. `progress(done, total)` counts rows. Raises SpecError for an
    unknown dtype or that of the source, StorageLossError where int8 would lose too much, CorruptCacheError for damage.

    >>> from sae_granary.cache.convert import convert
    >>> convert("cache/demo_l3", "cache/demo_l3_int8", "int8").dtype
    'int8'
    """
    opened, path = open_local(source), Path(target)
    parts = {part.path.name: part.path for part in opened.additions if part.covers(opened.records)}
    _check(opened, path, dtype)
    have = existing_manifest(path)
    grown = have is not None and have.complete and len(have.shards) < len(opened.records)  # the source was extended
    with CacheWriter.open(path, _spec(opened, dtype), extend=grown) as writer:
        if writer.n_shards > len(opened.records):
            raise SpecError(f"{path} holds {writer.n_shards} shards, {opened.path} only {len(opened.records)}")
        for record in opened.records[writer.n_shards :]:
            _check_shard(opened, record)
            writer.begin_buffer(record.cursor.source)
            writer.skip(record.cursor.rows_into_buffer - record.n_rows)
            for rows, documents in _blocks(opened, record):
                writer.append(rows, documents)
                progress(writer.n_rows, opened.n_rows)
            writer.end_shard()
        for warning in writer.warnings:
            say(f"warning: {warning}")
        writer.finish(opened.manifest.summary or {})
    made = _verified(opened, path)
    for addition in opened.additions:
        if addition.path.name not in parts:
            names = ", ".join(hook.name for hook in addition.manifest.hook_points)
            say(f"warning: {names} is left out: it was not added to all rows; `sae-harvest add` continues it")
    for name, part in parts.items():
        convert(part, path / ADDED / name, dtype, say=say)
    return open_local(path) if parts else made


def is_exact(source: str, target: str) -> bool:
    """Whether every value that a dtype gives is a value of another."""
    a, b = STORAGE[source].decoded, STORAGE[target]
    return b.scale is None and (a.name == b.name or b.item_bytes > a.item_bytes)


def _check(opened: Cache, target: Path, dtype: str) -> None:
    """What can be wrong before anything is written."""
    if dtype not in STORAGE:
        raise SpecError(f"dtype is {dtype!r}, expected one of {', '.join(STORAGE)}")
    if dtype == opened.dtype:
        raise SpecError(f"{opened.path} is stored as {dtype} already; copy its folder instead")
    if target.resolve() == opened.path.resolve():
        raise SpecError(f"{target} is the cache itself; give another folder: it is not rewritten")
    layout = cache_layout(opened.manifest.hook_points, dtype, opened.manifest.rows_per_shard)
    needed, free = layout.bytes_of(opened.n_rows) - bytes_in(target), free_bytes(target)
    if needed > free:
        raise DiskFullError(target, needed, free)


def _spec(opened: Cache, dtype: str) -> CacheSpec:
    manifest = opened.manifest
    before = f"{manifest.fingerprint[CONVERTED]}, {opened.dtype}" if CONVERTED in manifest.fingerprint else opened.dtype
    told = {CONVERTED: before}
    return CacheSpec(
        unit=manifest.unit,
        hook_points=opened.manifest.hook_points,
        dtype=dtype,
        rows_per_shard=manifest.rows_per_shard,
        provenance={**manifest.provenance, **told},
        fingerprint={**manifest.fingerprint, **({"dtype": dtype} if "dtype" in manifest.fingerprint else {}), **told},
        vocabulary=opened.vocabulary,
        inner_chunk_bytes=manifest.inner_chunk_bytes,
        kept_columns=manifest.kept_columns,
    )


def _check_shard(opened: Cache, record: ShardRecord) -> None:
    """Raise CorruptCacheError unless the files of a shard are as they were written."""
    for name, entry in record.files.items():
        check_file(opened.path / name, entry.n_bytes)
        if hash_file(opened.path / name) != entry:
            raise CorruptCacheError(
                f"{opened.path / name}: its checksum does not fit: restore it from a copy; nothing of this shard was "
                "converted"
            )


def _blocks(opened: Cache, record: ShardRecord) -> Iterator[tuple[Rows, list[DocumentRow]]]:
    """The rows of a shard in blocks of whole windows, with the documents that start in each."""
    i = record.shard
    columns = {name: opened.column(name).shard(i) for name in COLUMNS}
    names = [hook.name for hook in opened.manifest.hook_points]
    row_bytes = 4 * sum(hook.d_in for hook in opened.manifest.hook_points)
    size = min(MAX_ROWS, max(MIN_ROWS, BLOCK_BYTES // row_bytes))
    file = opened.path / documents_path(i)
    waiting = read_doc_ids(file)[::-1]
    start = 0
    for stop in _cuts(columns["window"], size):
        part = slice(start, stop)
        values = {name: opened.hook(name).block(i, start, stop) for name in names}
        cut: dict[str, Any] = {name: np.asarray(column[part]) for name, column in columns.items()}
        rows = Rows(values, **cut)
        last, documents = int(rows.doc_id.max()), []
        while waiting and waiting[-1] <= last:
            document = read_document(file, waiting.pop(), opened.kept_columns)
            if document is None:
                raise CorruptCacheError(f"{file}: a document that it lists is not there")
            documents.append(document)
        yield rows, documents
        start = stop


def _cuts(window: NDArray[np.uint64], size: int) -> Iterator[int]:
    """The ends of blocks of at least `size` rows, each at the end of a window."""
    ends = np.append(np.flatnonzero(window[1:] != window[:-1]) + 1, len(window))
    end = 0
    while end < len(window):
        end = int(ends[min(int(np.searchsorted(ends, end + size)), len(ends) - 1)])
        yield end


def _verified(opened: Cache, path: Path) -> Cache:
    """The new cache. Raises CacheError unless it is whole and its positions and documents are those of the source."""
    report = verify(path)
    if not report.ok:
        raise CacheError(
            f"{path}: {report.problems[0].path}: {report.problems[0].problem}; remove it and convert again"
        )
    made = open_local(path)
    for ours, theirs in zip(made.records, opened.records, strict=True):
        same = all(ours.files[name] == entry for name, entry in theirs.files.items() if name.startswith("rows/"))
        if not same or ours.documents != theirs.documents or ours.cursor != theirs.cursor:
            raise CacheError(f"{path}: shard {ours.shard} is not that of {opened.path}; remove it and convert again")
    return made
