"""The manifest and the commit records from their JSON, with every field checked.

No path of a file is ever taken from JSON: the paths follow from hook point names and shard numbers, and a record that
lists any other is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast, overload

import numpy as np
from numpy.typing import NDArray

from sae_granary.cache.errors import CorruptCacheError
from sae_granary.cache.format.affine import Affine, parse_affine
from sae_granary.cache.format.layout import documents_path
from sae_granary.cache.format.manifest import DocumentRange, FileEntry, Manifest, ShardRecord
from sae_granary.cache.format.signed import BLOCKS_VERSION, LOAD_IN_VERSION, Fields, RecordTexts
from sae_granary.cache.format.spec import MAX_ROWS_PER_SHARD, UNITS, Cursor, Unit
from sae_granary.cache.format.stats import Moments, parse_moments
from sae_granary.cache.format.storage import STORAGE
from sae_granary.common import signed
from sae_granary.common.rows import MAX_D_IN, SIDES, HookPoint, InvalidHookPointError, Side


class LazyRecords(Sequence[ShardRecord]):
    """The records of a large manifest, each parsed whenever it is asked for: all of 10^5 take 20 s and a gigabyte."""

    def __init__(self, manifest: Manifest, where: str, texts: RecordTexts, chosen: NDArray[np.int64]) -> None:
        self._manifest, self._where, self._texts, self._chosen = manifest, where, texts, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(shard number, rows) of each."""
        texts = self._texts
        return list(zip(texts.shards[self._chosen].tolist(), texts.n_rows[self._chosen].tolist(), strict=True))

    @property
    def checksum(self) -> str:
        """XXH3-128 of the whole manifest."""
        return signed.digest(self._texts.data)

    def select(self, chosen: slice | Sequence[int]) -> LazyRecords:
        """Some of these records."""
        return LazyRecords(self._manifest, self._where, self._texts, self._chosen[chosen])

    @overload
    def __getitem__(self, index: int) -> ShardRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ShardRecord]: ...
    def __getitem__(self, index: int | slice) -> ShardRecord | Sequence[ShardRecord]:
        if isinstance(index, slice):
            return self.select(index)
        i = int(self._chosen[index])
        start, end = self._texts.starts[i : i + 2].tolist()
        where = f"{self._where}, shards[{i}]"
        try:
            body = signed.parse_object(self._texts.data[start : end - 1])
        except ValueError as error:
            raise CorruptCacheError(f"{where} is {error}: altered; restore it") from None
        return parse_shard_record(Fields(body, where), self._manifest, consolidated=True)


def sizes_of(records: Sequence[ShardRecord]) -> list[tuple[int, int]]:
    """(shard number, rows) of each of these records."""
    return records.sizes if isinstance(records, LazyRecords) else [(record.shard, record.n_rows) for record in records]


def select_records(records: Sequence[ShardRecord], numbers: Sequence[int]) -> Sequence[ShardRecord]:
    """The records at these places; those that were not parsed yet still are not."""
    if isinstance(records, LazyRecords):
        return records.select(numbers)
    return tuple(records[number] for number in numbers)


def parse_manifest(body: dict[str, Any], where: str, texts: RecordTexts | None = None) -> Manifest:
    """A manifest from its JSON form; raises CorruptCacheError with the field, the value and what was expected.

    With `texts` its list of shards is empty: the records are parsed from them when they are asked for.
    """
    fields = Fields(body, where)
    complete = fields.get("complete", bool)
    manifest = Manifest(
        complete=complete,
        unit=cast(Unit, fields.choice("unit", UNITS)),
        dtype=fields.choice("dtype", tuple(STORAGE)),
        rows_per_shard=fields.integer("rows_per_shard", 1, MAX_ROWS_PER_SHARD),
        inner_chunk_bytes=fields.integer("inner_chunk_bytes", 1),
        hook_points=fields.objects("hook_points", _parse_hook_point),
        provenance=fields.get("provenance", dict),
        fingerprint=fields.get("fingerprint", dict),
        vocabulary=parse_file_entry(fields.nested("vocabulary")) if fields.optional("vocabulary", dict) else None,
        kept_columns=_parse_kept_columns(fields),
        block_docs=_parse_block_docs(fields),
    )
    if fields.get("version", int) != manifest.version:
        why = f"by its dtype {manifest.dtype}, its blocks and how its model was loaded"
        raise fields.error("version", body["version"], f"{manifest.version}, {why}")
    names = {hook.name.casefold() for hook in manifest.hook_points}
    if not names or len(names) != len(manifest.hook_points):
        raise CorruptCacheError(f"{where}: hook_points must be at least one, with names that differ")
    if not complete:
        return manifest
    shards: Sequence[ShardRecord]
    if texts is None:
        shards = fields.objects("shards", lambda f: parse_shard_record(f, manifest, consolidated=True))
        blocks = [record.block or 0 for record in shards]
    else:
        shards, blocks = LazyRecords(manifest, where, texts, np.arange(len(texts.shards))), texts.blocks.tolist()
    sizes = sizes_of(shards)
    if [shard for shard, _ in sizes] != list(range(len(shards))):
        raise CorruptCacheError(f"{where}: shards are not numbered from 0 without a gap")
    if blocks != sorted(blocks):
        raise CorruptCacheError(f"{where}: shards are not in the order of their blocks")
    statistics = _parse_statistics(fields, manifest)
    n_rows = sum(n for _, n in sizes)
    if not shards or any(moments.n_rows != n_rows for moments in statistics.values()):
        raise CorruptCacheError(f"{where}: shards hold {n_rows} rows, the statistics are of another number")
    return replace(
        manifest,
        affines=_parse_affines(fields, manifest),
        summary=fields.get("summary", dict),
        extended=_parse_extended(fields, len(shards)),
        zarr_files=fields.mapping("zarr", parse_file_entry),
        statistics=statistics,
        shards=shards,
    )


def parse_shard_record(fields: Fields, manifest: Manifest, *, consolidated: bool) -> ShardRecord:
    """A commit record from its JSON form, held against the manifest: sizes and file names must be the expected ones."""
    docs = fields.optional("documents", dict)
    cursor, windows = fields.nested("cursor"), fields.nested("windows")
    source = cursor.nested("source")
    record = ShardRecord(
        shard=fields.integer("shard"),
        n_rows=fields.integer("n_rows", 1),
        first_window=windows.integer("first"),
        last_window=windows.integer("last"),
        documents=None if docs is None else _parse_documents(fields.nested("documents")),
        cursor=Cursor({key: source.get(key, int) for key in source.body}, cursor.integer("rows_into_buffer")),
        files=fields.mapping("files", parse_file_entry),
        statistics=None if consolidated else _parse_statistics(fields, manifest),
        record=parse_file_entry(fields.nested("record")) if consolidated else None,
        affines=_parse_affines(fields, manifest) if fields.integer("shard") == 0 and not consolidated else None,
        block=None if manifest.block_docs is None else fields.integer("block"),
    )
    if record.n_rows > manifest.rows_per_shard:
        raise fields.error("n_rows", record.n_rows, f"at most {manifest.rows_per_shard}, the rows of a shard")
    expected: dict[str, int | None] = dict(manifest.layout.shard_files(record.shard, record.n_rows))
    expected[documents_path(record.shard)] = None  # compressed: no size to expect
    if expected.keys() != record.files.keys():
        wrong = sorted(expected.keys() ^ record.files.keys())
        raise CorruptCacheError(f"{fields.where}: files are not those of shard {record.shard}: {', '.join(wrong)}")
    for path, size in expected.items():
        if size is not None and record.files[path].n_bytes != size:
            raise fields.error(path, record.files[path].n_bytes, f"{size} bytes for {record.n_rows} rows")
    return record


def parse_file_entry(fields: Fields) -> FileEntry:
    """A file entry from its JSON form."""
    return FileEntry(fields.integer("bytes"), fields.get("xxh3", str))


def _parse_kept_columns(fields: Fields) -> tuple[str, ...]:
    names = fields.optional("kept_columns", list) or []
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise fields.error("kept_columns", names, "names that differ")
    return tuple(names)


def _parse_block_docs(fields: Fields) -> int | None:
    version = fields.body.get("version")
    told = version == BLOCKS_VERSION or (version == LOAD_IN_VERSION and "block_docs" in fields.body)
    return fields.integer("block_docs", 1) if told else None


def _parse_extended(fields: Fields, n_shards: int) -> tuple[dict[str, Any], ...]:
    if "extended" not in fields.body:
        return ()
    earlier = fields.objects("extended", lambda f: {**f.body, "n_shards": f.integer("n_shards")})
    ends = [0, *(summary["n_shards"] for summary in earlier), n_shards]
    if any(a >= b for a, b in pairwise(ends)):
        raise fields.error("extended", ends[1:-1], f"ascending numbers of shards, below {n_shards}")
    return earlier


def _parse_documents(fields: Fields) -> DocumentRange:
    return DocumentRange(fields.integer("n", 1), fields.integer("first"), fields.integer("last"))


def _parse_hook_point(fields: Fields) -> HookPoint:
    try:
        return HookPoint(
            name=fields.get("name", str),
            module=fields.get("module", str),
            side=cast(Side, fields.choice("side", SIDES)),
            tuple_index=fields.optional("tuple_index", int),
            d_in=fields.integer("d_in", 1, MAX_D_IN),
        )
    except InvalidHookPointError as error:
        raise CorruptCacheError(f"{fields.where}: {error}") from None


def _parse_statistics(fields: Fields, manifest: Manifest) -> dict[str, Moments]:
    statistics = fields.mapping("statistics", parse_moments)
    expected = {hook.name: hook.d_in for hook in manifest.hook_points}
    if {hook: len(moments.mean_D) for hook, moments in statistics.items()} != expected:
        raise CorruptCacheError(f"{fields.where}: statistics are not those of the hook points {sorted(expected)}")
    measured = STORAGE[manifest.dtype].scale is not None
    if any((moments.error_D is not None) != measured for moments in statistics.values()):
        raise fields.error("statistics", sorted(statistics), f"error {'with' if measured else 'without'} each")
    return statistics


def _parse_affines(fields: Fields, manifest: Manifest) -> dict[str, Affine] | None:
    """Steps and offsets of the hook points, for dtypes with scales."""
    if STORAGE[manifest.dtype].scale is None:
        return None
    affines = fields.mapping("affine", parse_affine)
    expected = {hook.name: hook.d_in for hook in manifest.hook_points}
    if {hook: len(affine.step_D) for hook, affine in affines.items()} != expected:
        raise CorruptCacheError(f"{fields.where}: affine is not that of the hook points {sorted(expected)}")
    return affines
