"""A cache that several processes harvest in blocks: each block is a cache of its own until all are joined into one.

FORMAT.md, "Blocks", says what is where. Whoever finds all blocks complete joins them; two may do so at once, since
every step leaves what is there and right, and the same blocks give the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_granary.cache.errors import CacheError, CacheMismatchError, ConcurrentWriteError
from sae_granary.cache.format.documents import hash_file
from sae_granary.cache.format.layout import (
    BLOCKS,
    COMMITS,
    DOCUMENTS,
    MANIFEST,
    VOCABULARY,
    CacheLayout,
    blocks_path,
    commit_path,
    documents_path,
)
from sae_granary.cache.format.manifest import FileEntry, Manifest, ShardRecord, differences, finished, manifest_of
from sae_granary.cache.format.records import existing_manifest, load_manifest, load_records
from sae_granary.cache.format.signed import dump_signed
from sae_granary.cache.format.spec import CacheSpec
from sae_granary.cache.format.zarr_json import zarr_files
from sae_granary.cache.write.session import Session, sync_folders
from sae_granary.cache.write.spec_json import plain_json, plain_spec, vocabulary_bytes
from sae_granary.common import files


def begin_blocks(path: Path, spec: CacheSpec) -> Manifest:
    """Begin a cache in blocks, or join in where another process has begun it; its manifest.

    Raises CacheMismatchError with the fields that differ, CacheExistsError where the folder holds something else.
    """
    vocabulary = vocabulary_bytes(spec.vocabulary)
    want = manifest_of(plain_spec(spec), None if vocabulary is None else FileEntry.of(vocabulary))
    have = existing_manifest(path)
    if have is None:
        path.mkdir(parents=True, exist_ok=True)
        with _session(path) as session, contextlib.suppress(FileExistsError):  # another process was faster
            session.put(MANIFEST, dump_signed(want.to_json()))
        have = load_manifest(path)
    if differing := differences(have, want):
        raise CacheMismatchError(path, differing, f"{path}_2")
    if not have.complete:
        (path / BLOCKS).mkdir(exist_ok=True)
        for folder in (COMMITS, DOCUMENTS, *have.layout.folders):
            (path / folder).mkdir(exist_ok=True)
        if vocabulary is not None and not (path / VOCABULARY).exists():
            with _session(path) as session, contextlib.suppress(FileExistsError):
                session.put(VOCABULARY, vocabulary)
    return have


@contextlib.contextmanager
def _session(path: Path) -> Iterator[Session]:
    """A temporary folder for this process alone; those of other processes stay."""
    session = Session(path)
    while True:
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # another process removes the folder above
            session.folder.mkdir(parents=True)
            break
    try:
        yield session
    finally:
        shutil.rmtree(session.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            session.folder.parent.rmdir()


def join_blocks(
    path: Path, blocks: Sequence[tuple[int, Path]], summary: Mapping[str, Any], n_shards: int = 0
) -> Manifest:
    """Make one complete cache of its blocks (number, folder), which ascend and all have rows; the folders stay.

    With `n_shards` the blocks come behind so many shards of a complete cache, which its readers see until the end.
    """
    manifest = load_manifest(path)
    if manifest.complete and len(manifest.shards) > n_shards:
        return manifest
    parts = [(number, folder, load_manifest(folder)) for number, folder in blocks]
    for number, _, part in parts:
        if part.provenance != parts[0][2].provenance or not _fitted_alike(part, parts[0][2]):
            raise CacheError(f"{path}: blocks {parts[0][0]} and {number} are of other models or versions: remove it")
    records = load_records(path, manifest)[:n_shards]
    with _session(path) as session:
        for number, folder, part in parts:
            joined = [
                _renamed(r, len(records) + i, number, part.layout) for i, r in enumerate(load_records(folder, part))
            ]
            for record, names in joined:
                for old, new in names.items():
                    _link(folder / old, path / new, record.files[new])
            sync_folders(path / Path(new).parent for _, names in joined for new in names.values())
            records += [_put_record(session, path, manifest, record) for record, _ in joined]
        told = manifest if n_shards else replace(manifest, provenance=parts[0][2].provenance)
        told = replace(told, affines=records[0].affines)
        zarr = zarr_files(told.layout, len(records))
        session.write_zarr(told.layout, len(records), durable=True)
        entries = {name: FileEntry.of(data) for name, data in zarr.items()}
        complete = finished(told, records, entries, plain_json(summary, "summary"))
        session.replace(MANIFEST, dump_signed(complete.to_json()))
    return complete


def remove_blocks(path: Path, n_shards: int | None = None) -> None:
    """Remove the blocks of a complete cache; with `n_shards`, all its shards, those of an extension of it stay."""
    folder, extension = path / BLOCKS, None if n_shards is None else path / blocks_path(n_shards)
    for _ in range(3):  # a process that has not noticed yet may still write there
        with contextlib.suppress(OSError):
            for entry in [] if folder.is_symlink() else list(folder.iterdir()):
                if entry.is_dir() and entry != extension:
                    shutil.rmtree(entry, ignore_errors=True)
                elif entry != extension:
                    entry.unlink(missing_ok=True)
            folder.rmdir()


def _fitted_alike(a: Manifest, b: Manifest) -> bool:
    """Whether two blocks have the same steps and offsets, or none."""
    ours, theirs = a.affines or {}, b.affines or {}
    return ours.keys() == theirs.keys() and all(ours[hook].equals(theirs[hook]) for hook in ours)


def _renamed(record: ShardRecord, shard: int, block: int, layout: CacheLayout) -> tuple[ShardRecord, dict[str, str]]:
    """A record of a block as one of the whole cache, and old path -> new path of its files."""
    names = {array.shard_path(record.shard): array.shard_path(shard) for array in layout.arrays}
    names[documents_path(record.shard)] = documents_path(shard)
    renamed = {names[path]: entry for path, entry in record.files.items()}
    affines = record.affines if shard == 0 else None
    return replace(record, shard=shard, block=block, files=renamed, record=None, affines=affines), names


def _link(source: Path, target: Path, entry: FileEntry) -> None:
    """Give a file of a block its name in the whole cache; nothing is done where it has that already."""
    try:
        os.link(source, target)
        return
    except (FileExistsError, FileNotFoundError):  # linked, or moved where there are no hard links: by another join
        pass
    except OSError as error:
        if error.errno not in files.NO_LINKS:
            raise
        if not target.exists():
            os.rename(source, target)
            return
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.stat(source), os.stat(target)):
            return
    _check(target, entry)


def _check(target: Path, entry: FileEntry) -> None:
    try:
        same = target.stat().st_size == entry.n_bytes and hash_file(target) == entry
    except FileNotFoundError:
        same = False
    if not same:
        raise ConcurrentWriteError(f"{target} is not what its block recorded: remove the cache and harvest it again")


def _put_record(session: Session, path: Path, manifest: Manifest, record: ShardRecord) -> ShardRecord:
    data = dump_signed({"version": manifest.version, **record.to_json()})
    place = commit_path(record.shard)
    try:
        session.put(place, data)
    except FileExistsError:
        if files.read_regular(path / place) != data:
            raise ConcurrentWriteError(f"{path / place} is not that of these blocks: remove the cache") from None
    return replace(record, record=FileEntry.of(data))
