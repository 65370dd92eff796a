"""What travels of a cache: all of it byte for byte, or some of its hook points and its first shards as a cache."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from sae_granary.cache.errors import CacheError, CorruptCacheError, IncompleteCacheError, UnknownNameError
from sae_granary.cache.format.layout import VOCABULARY, commit_path, documents_path
from sae_granary.cache.format.manifest import FileEntry, Manifest, ShardRecord, finished
from sae_granary.cache.format.parse import parse_manifest, parse_shard_record, sizes_of
from sae_granary.cache.format.signed import Fields, dump_signed, load_signed
from sae_granary.cache.format.zarr_json import zarr_files
from sae_granary.cache.read.added import Addition, hooks_of, shorter
from sae_granary.common.signed import digest

Added = tuple[str, Manifest, Sequence[ShardRecord]]  # folder of an addition, and what is in it


@dataclass(frozen=True)
class Parcel:
    """A cache to be copied; `manifest_bytes` is written last."""

    manifest: Manifest
    manifest_bytes: bytes
    files: Mapping[str, FileEntry]  # copied as they are
    made: Mapping[str, bytes]  # written anew: of a part its records and its Zarr metadata
    places: Mapping[str, str] = field(default_factory=dict)  # where files are that are elsewhere at the source

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        made = sum(map(len, self.made.values()))
        return sum(entry.n_bytes for entry in self.files.values()) + made + len(self.manifest_bytes)

    @property
    def n_rows(self) -> int:
        """Rows of the cache that arrives."""
        return sum(record.n_rows for record in self.manifest.shards)

    def place(self, path: str) -> str:
        """Where a file is at the source."""
        return self.places.get(path, path)


def parse(data: bytes, place: str) -> Manifest:
    """The manifest of a complete cache from its bytes. Raises IncompleteCacheError, CorruptCacheError, ..."""
    manifest = parse_manifest(load_signed(cast(Any, place), data), place)
    if not manifest.complete:
        raise IncompleteCacheError(f"{place}: its harvest has not finished; only complete caches travel")
    if set(manifest.zarr_files or ()) != set(zarr_files(manifest.layout, len(manifest.shards))):
        raise CorruptCacheError(f"{place}: its Zarr files are not those of this cache")  # no path comes from a manifest
    return manifest


def parse_record(data: bytes, manifest: Manifest, place: str) -> ShardRecord:
    """A commit record from its bytes."""
    return parse_shard_record(Fields(load_signed(cast(Any, place), data), place), manifest, consolidated=False)


def whole(manifest: Manifest, data: bytes) -> Parcel:
    """All of a cache."""
    files: dict[str, FileEntry] = {}
    for record in manifest.shards:
        files |= record.files
        if record.record is not None:
            files[commit_path(record.shard)] = record.record
    files |= manifest.zarr_files or {}
    if manifest.vocabulary is not None:
        files[VOCABULARY] = manifest.vocabulary
    return Parcel(manifest, data, files, {})


def without_activations(parcel: Parcel) -> Parcel:
    """All of it but what is fetched shard by shard where a cache is read while it is fetched."""
    layout, shards = parcel.manifest.layout, [shard for shard, _ in sizes_of(parcel.manifest.shards)]
    arrays = [array for hook in layout.activations for array in layout.late(hook)]
    late = {array.shard_path(shard) for array in arrays for shard in shards}
    return replace(parcel, files={path: entry for path, entry in parcel.files.items() if path not in late})


def chosen(
    place: str, manifest: Manifest, additions: Sequence[Addition], hooks: Sequence[str], n_rows: int | None
) -> tuple[list[str], list[str], list[Addition]]:
    """The commit records and hook points of a part, and the additions that hold some of these.

    Without `hooks` they are the cache's own. Raises UnknownNameError.
    """
    shards = manifest.shards[: first_shards(manifest, n_rows)]
    own = [hook.name for hook in manifest.hook_points]
    offered = hooks_of(additions, shards)
    names = list(hooks) or own
    for name in names:
        if name not in own and name not in offered:
            known = ", ".join(sorted([*own, *offered]))
            raise UnknownNameError(
                f"{place}: no hook point {name!r}: there are {known}{shorter(name, additions, shards)}"
            )
    needed = [part for part in additions if any(offered[n][1] is part for n in names if n in offered)]
    return [commit_path(record.shard) for record in shards], names, needed


def first_shards(manifest: Manifest, n_rows: int | None) -> int:
    """How many shards hold the first n rows; all for None."""
    if n_rows is None:
        return len(manifest.shards)
    if n_rows < 1:
        raise CacheError(f"--rows is {n_rows}, expected at least 1")
    total = 0
    for n, record in enumerate(manifest.shards, 1):
        total += record.n_rows
        if total >= n_rows:
            return n
    return len(manifest.shards)


def part(manifest: Manifest, records: Sequence[ShardRecord], hooks: Sequence[str], added: Sequence[Added]) -> Parcel:
    """Some hook points of the first shards as one cache, from the cache and from what was added to it.

    `records` are these shards' own, with statistics, and so are those of each addition.
    """
    manifest, records, places = _joined(manifest, records, added)
    points = tuple(hook for hook in manifest.hook_points if hook.name in hooks)
    identity = json.dumps(dict(manifest.fingerprint), sort_keys=True).encode()
    base = replace(
        manifest,
        complete=False,
        hook_points=points,
        fingerprint={
            **manifest.fingerprint,
            "hook_points": ", ".join(hook.name for hook in points),
            "part_of_xxh3": digest(identity),
            "part_shards": len(records),
        },
        affines=None if manifest.affines is None else {h.name: manifest.affines[h.name] for h in points},
        shards=(),
        statistics=None,
        zarr_files=None,
        extended=(),
    )
    made: dict[str, bytes] = {}
    own: list[ShardRecord] = []
    for record in records:
        wanted = {*base.layout.shard_files(record.shard, record.n_rows), documents_path(record.shard)}
        record = replace(
            record,
            files={path: entry for path, entry in record.files.items() if path in wanted},
            statistics={h.name: record.statistics[h.name] for h in points} if record.statistics else None,
            affines={h.name: record.affines[h.name] for h in points} if record.affines else None,
            record=None,
        )
        made[commit_path(record.shard)] = data = dump_signed({"version": base.version, **record.to_json()})
        own.append(replace(record, record=FileEntry.of(data)))
    zarr = zarr_files(base.layout, len(own))
    documents = sum(record.documents.n for record in own if record.documents is not None)
    summary = {**(manifest.summary or {}), "n_rows": sum(r.n_rows for r in own), "n_documents": documents}
    new = finished(base, own, {path: FileEntry.of(data) for path, data in zarr.items()}, summary)
    files = {path: entry for record in own for path, entry in record.files.items()}
    if manifest.vocabulary is not None:
        files[VOCABULARY] = manifest.vocabulary
    return Parcel(new, dump_signed(new.to_json()), files, made | zarr, {p: places[p] for p in files if p in places})


def _joined(
    manifest: Manifest, records: Sequence[ShardRecord], added: Sequence[Added]
) -> tuple[Manifest, list[ShardRecord], dict[str, str]]:
    """A cache that has the hook points of additions, too, and where their files are."""
    joined, places = list(records), dict[str, str]()
    for folder, addition, theirs in added:
        manifest = replace(
            manifest,
            hook_points=(*manifest.hook_points, *addition.hook_points),
            affines=None if manifest.affines is None else {**manifest.affines, **(addition.affines or {})},
        )
        for i, (ours, other) in enumerate(zip(joined, theirs, strict=True)):
            new = {path: entry for path, entry in other.files.items() if path not in ours.files}
            places |= {path: f"{folder}/{path}" for path in new}
            joined[i] = replace(
                ours,
                files={**ours.files, **new},
                statistics={**(ours.statistics or {}), **(other.statistics or {})},
                affines=None if ours.affines is None else {**ours.affines, **(other.affines or {})},
            )
    return manifest, joined, places


def check_continued(old: Manifest, new: Manifest, old_place: str, new_place: str) -> None:
    """Raise CacheError unless `new` is `old` with as many shards or more."""
    n = min(len(old.shards), len(new.shards))
    same = [record.record for record in old.shards[:n]] == [record.record for record in new.shards[:n]]
    if old.fingerprint != new.fingerprint or old.hook_points != new.hook_points or not same:
        raise CacheError(f"{old_place} holds another cache than {new_place}: use another place; nothing was copied")
    if len(new.shards) < len(old.shards):
        raise CacheError(
            f"{old_place} is newer: it has {len(old.shards)} shards, {new_place} {len(new.shards)}; nothing was copied"
        )
