"""The manifest and the commit records as frozen dataclasses, and their JSON; `parse` reads it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sae_granary.cache.format.affine import Affine, affines_json
from sae_granary.cache.format.layout import CacheLayout, cache_layout
from sae_granary.cache.format.signed import BLOCKS_VERSION, LOAD_IN_VERSION
from sae_granary.cache.format.spec import CacheSpec, Cursor, Unit
from sae_granary.cache.format.stats import Moments, merge_all
from sae_granary.cache.format.storage import STORAGE
from sae_granary.common.rows import HookPoint
from sae_granary.common.signed import digest


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
    affines: Mapping[str, Affine] | None = None  # by hook point; in shard 0's own record, of dtypes with scales
    block: int | None = None  # of caches that were harvested in blocks of documents

    @property
    def n_bytes(self) -> int:
        """Bytes of its files."""
        return sum(entry.n_bytes for entry in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """JSON form; of a record with statistics the commit record, of one without the manifest's line."""
        docs = self.documents
        body: dict[str, Any] = {
            "shard": self.shard,
            **({} if self.block is None else {"block": self.block}),
            "n_rows": self.n_rows,
            "windows": {"first": self.first_window, "last": self.last_window},
            "documents": None if docs is None else {"n": docs.n, "first": docs.first, "last": docs.last},
            "cursor": {"source": dict(self.cursor.source), "rows_into_buffer": self.cursor.rows_into_buffer},
            "files": {path: entry.to_json() for path, entry in self.files.items()},
        }
        if self.statistics is not None:
            body["statistics"] = {hook: moments.to_json() for hook, moments in self.statistics.items()}
        if self.affines is not None:
            body["affine"] = affines_json(self.affines)
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
    kept_columns: tuple[str, ...] = ()  # of the source's records, stored with the documents
    shards: Sequence[ShardRecord] = ()
    statistics: Mapping[str, Moments] | None = None
    zarr_files: Mapping[str, FileEntry] | None = None
    summary: Mapping[str, Any] | None = None
    affines: Mapping[str, Affine] | None = None  # by hook point, of dtypes with scales; of unfinished caches in shard 0
    extended: tuple[Mapping[str, Any], ...] = ()  # summaries of the harvests that were extended, each with `n_shards`
    block_docs: int | None = None  # documents of a block, of caches that were harvested in blocks

    @property
    def version(self) -> int:
        """Version of the format: the highest of those of its dtype, of its blocks, and of how its model was loaded."""
        if self.model.get("load_in") is not None:
            return LOAD_IN_VERSION
        return STORAGE[self.dtype].version if self.block_docs is None else BLOCKS_VERSION

    @property
    def model(self) -> Mapping[str, Any]:
        """What the provenance records of the model; empty where it records none."""
        model = self.provenance.get("model")
        return model if isinstance(model, Mapping) else {}

    @cached_property
    def layout(self) -> CacheLayout:
        """Paths, shapes and types of its arrays."""
        sizes = (self.rows_per_shard, self.inner_chunk_bytes)
        return replace(cache_layout(self.hook_points, self.dtype, *sizes, self.affines), version=self.version)

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        body: dict[str, Any] = {
            "version": self.version,
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
        if self.kept_columns:  # else a manifest is byte for byte what it was before there were any
            body["kept_columns"] = list(self.kept_columns)
        if self.block_docs is not None:
            body["block_docs"] = self.block_docs
        if self.complete:
            if self.affines is not None:
                body["affine"] = affines_json(self.affines)
            body["summary"] = dict(self.summary or {})
            body["zarr"] = {path: entry.to_json() for path, entry in (self.zarr_files or {}).items()}
            body["statistics"] = {hook: m.to_json() for hook, m in (self.statistics or {}).items()}
            if self.extended:
                body["extended"] = [dict(summary) for summary in self.extended]
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
        kept_columns=tuple(spec.kept_columns),
        block_docs=spec.block_docs,
    )


def fitted(manifest: Manifest, records: Sequence[ShardRecord]) -> Manifest:
    """The manifest of an unfinished cache with the steps and offsets that its first shard holds, where it has any."""
    return replace(manifest, affines=records[0].affines) if records and not manifest.complete else manifest


def finished(
    manifest: Manifest, records: Sequence[ShardRecord], zarr: Mapping[str, FileEntry], summary: Mapping[str, Any]
) -> Manifest:
    """The manifest of the same harvest when it is complete."""
    statistics = {
        hook.name: merge_all(record.statistics[hook.name] for record in records if record.statistics)
        for hook in manifest.hook_points
    }
    shards = tuple(replace(record, statistics=None) for record in records)
    earlier: tuple[Mapping[str, Any], ...] = ()
    if manifest.complete:  # it was extended
        earlier = (*manifest.extended, {"n_shards": len(manifest.shards), **(manifest.summary or {})})
    return replace(
        manifest,
        complete=True,
        shards=shards,
        statistics=statistics,
        zarr_files=dict(zarr),
        summary=dict(summary),
        extended=earlier,
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
    identity["kept_columns"] = list(manifest.kept_columns) or None
    return identity | dict(manifest.fingerprint)
