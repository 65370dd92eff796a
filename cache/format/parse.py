"""The manifest and the commit records from their JSON, with every field checked.

No path of a file is ever taken from JSON: the paths follow from hook point names and shard numbers, and a record that
lists any other is refused.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

from sae_granary.cache.errors import CorruptCacheError
from sae_granary.cache.format.affine import Affine, parse_affine
from sae_granary.cache.format.layout import documents_path
from sae_granary.cache.format.manifest import DocumentRange, FileEntry, Manifest, ShardRecord
from sae_granary.cache.format.signed import BLOCKS_VERSION, Fields
from sae_granary.cache.format.spec import MAX_ROWS_PER_SHARD, UNITS, Cursor, Unit
from sae_granary.cache.format.stats import Moments, parse_moments
from sae_granary.cache.format.storage import STORAGE
from sae_granary.common.rows import MAX_D_IN, SIDES, HookPoint, InvalidHookPointError, Side


def parse_manifest(body: dict[str, Any], where: str) -> Manifest:
    """A manifest from its JSON form; raises CorruptCacheError with the field, the value and what was expected."""
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
        raise fields.error("version", body["version"], f"{manifest.version}, by its dtype {manifest.dtype} and blocks")
    names = {hook.name.casefold() for hook in manifest.hook_points}
    if not names or len(names) != len(manifest.hook_points):
        raise CorruptCacheError(f"{where}: hook_points must be at least one, with names that differ")
    if not complete:
        return manifest
    shards = fields.objects("shards", lambda f: parse_shard_record(f, manifest, consolidated=True))
    if [record.shard for record in shards] != list(range(len(shards))):
        raise CorruptCacheError(f"{where}: shards are not numbered from 0 without a gap")
    if any((a.block or 0) > (b.block or 0) for a, b in pairwise(shards)):
        raise CorruptCacheError(f"{where}: shards are not in the order of their blocks")
    statistics = _parse_statistics(fields, manifest)
    n_rows = sum(record.n_rows for record in shards)
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
    return fields.integer("block_docs", 1) if fields.body.get("version") == BLOCKS_VERSION else None


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
