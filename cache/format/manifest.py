"""The manifest and the commit records as frozen dataclasses: to JSON, and back with every field checked.

No path of a file is ever taken from JSON: the paths follow from hook point names and shard numbers, and a record that
lists any other is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from sae_granary.cache.errors import CorruptCacheError
from sae_granary.cache.format.layout import CacheLayout, cache_layout, documents_path
from sae_granary.cache.format.signed import Fields, digest
from sae_granary.cache.format.spec import MAX_ROWS_PER_SHARD, UNITS, CacheSpec, Cursor, Unit
from sae_granary.cache.format.stats import Moments, parse_moments
from sae_granary.cache.format.storage import STORAGE
from sae_granary.common.rows import MAX_D_IN, SIDES, HookPoint, InvalidHookPointError, Side


@dataclass(frozen=True)
class FileEntry:
    """Size and checksum (XXH3-128) of a file."""

    n_bytes: int
    xxh3: str

    @classmethod
    def of(cls, data: bytes) -> FileEntry:
        """The entry of a file with this content."""
        return cls(len(data), digest(data))

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {"bytes": self.n_bytes, "xxh3": self.xxh3}


@dataclass(frozen=True)
class DocumentRange:
    """The documents whose first row is in a shard; ids between `first` and `last` may have no rows."""

    n: int
    first: int
    last: int


@dataclass(frozen=True)
class ShardRecord:
    """A committed shard."""

    shard: int
    n_rows: int
    first_window: int
    last_window: int
    documents: DocumentRange | None  # None when no document starts here
    cursor: Cursor
    files: Mapping[str, FileEntry]
    statistics: Mapping[str, Moments] | None  # by hook point; in the shard's own record, not in the manifest
    record: FileEntry | None = None  # of commits/<shard>.json; in the manifest only

    @property
    def n_bytes(self) -> int:
        """Bytes of its files."""
        return sum(entry.n_bytes for entry in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """JSON form; of a record with statistics the commit record, of one without the manifest's line."""
        docs = self.documents
        body: dict[str, Any] = {
            "shard": self.shard,
            "n_rows": self.n_rows,
            "windows": {"first": self.first_window, "last": self.last_window},
            "documents": None if docs is None else {"n": docs.n, "first": docs.first, "last": docs.last},
            "cursor": {"source": dict(self.cursor.source), "rows_into_buffer": self.cursor.rows_into_buffer},
            "files": {path: entry.to_json() for path, entry in self.files.items()},
        }
        if self.statistics is not None:
            body["statistics"] = {hook: moments.to_json() for hook, moments in self.statistics.items()}
        if self.record is not None:
            body["record"] = self.record.to_json()
        return body


@dataclass(frozen=True)
class Manifest:
    """What a cache is. `shards` and `statistics` are filled in when it is complete."""

    complete: bool
    unit: Unit
    dtype: str
    rows_per_shard: int
    inner_chunk_bytes: int
    hook_points: tuple[HookPoint, ...]
    provenance: Mapping[str, Any]
    fingerprint: Mapping[str, Any]
    vocabulary: FileEntry | None
    shards: tuple[ShardRecord, ...] = ()
    statistics: Mapping[str, Moments] | None = None
    zarr_files: Mapping[str, FileEntry] | None = None
    summary: Mapping[str, Any] | None = None

    @cached_property
    def layout(self) -> CacheLayout:
        """Where its bytes lie."""
        return cache_layout(self.hook_points, self.dtype, self.rows_per_shard, self.inner_chunk_bytes)

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        body: dict[str, Any] = {
            "complete": self.complete,
            "unit": self.unit,
            "dtype": self.dtype,
            "rows_per_shard": self.rows_per_shard,
            "inner_chunk_bytes": self.inner_chunk_bytes,
            "hook_points": [dict(vars(hook)) for hook in self.hook_points],
            "provenance": dict(self.provenance),
            "fingerprint": dict(self.fingerprint),
            "vocabulary": None if self.vocabulary is None else self.vocabulary.to_json(),
        }
        if self.complete:
            body["summary"] = dict(self.summary or {})
            body["zarr"] = {path: entry.to_json() for path, entry in (self.zarr_files or {}).items()}
            body["statistics"] = {hook: m.to_json() for hook, m in (self.statistics or {}).items()}
            body["shards"] = [record.to_json() for record in self.shards]
        return body


def manifest_of(spec: CacheSpec, vocabulary: FileEntry | None) -> Manifest:
    """The manifest of a harvest that has not written anything yet."""
    return Manifest(
        complete=False,
        unit=spec.unit,
        dtype=spec.dtype,
        rows_per_shard=spec.rows_per_shard,
        inner_chunk_bytes=spec.inner_chunk_bytes,
        hook_points=tuple(spec.hook_points),
        provenance=spec.provenance,
        fingerprint=spec.fingerprint,
        vocabulary=vocabulary,
    )


def differences(have: Manifest, want: Manifest) -> dict[str, tuple[object, object]]:
    """The fields in which two caches could not be the same harvest: field -> (have, want)."""
    shared = {hook.name for hook in have.hook_points} & {hook.name for hook in want.hook_points}
    a, b = _identity(have, shared), _identity(want, shared)
    return {name: (a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)}


def _identity(manifest: Manifest, hooks: set[str]) -> dict[str, object]:
    identity: dict[str, object] = {
        name: getattr(manifest, name) for name in ("unit", "dtype", "rows_per_shard", "inner_chunk_bytes")
    }
    identity["hook_points"] = [h.name for h in manifest.hook_points]
    for hook in manifest.hook_points:
        if hook.name not in hooks:
            continue
        identity |= {f"{hook.name}.{field}": value for field, value in vars(hook).items()}
    identity["vocabulary"] = manifest.vocabulary and manifest.vocabulary.xxh3
    return identity | dict(manifest.fingerprint)


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
    )
    names = {hook.name.casefold() for hook in manifest.hook_points}
    if not names or len(names) != len(manifest.hook_points):
        raise CorruptCacheError(f"{where}: hook_points must be at least one, with names that differ")
    if not complete:
        return manifest
    shards = fields.objects("shards", lambda f: parse_shard_record(f, manifest, consolidated=True))
    if [record.shard for record in shards] != list(range(len(shards))):
        raise CorruptCacheError(f"{where}: shards are not numbered from 0 without a gap")
    statistics = _parse_statistics(fields, manifest)
    n_rows = sum(record.n_rows for record in shards)
    if not shards or any(moments.n_rows != n_rows for moments in statistics.values()):
        raise CorruptCacheError(f"{where}: shards hold {n_rows} rows, the statistics are of another number")
    return replace(
        manifest,
        summary=fields.get("summary", dict),
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
    return statistics
