"""Copy a cache from remote storage: files in parallel, each checked as it arrives, the manifest last.

Files wait in the folder's `.tmp` until all are there and right; a pull that was cut off continues with them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sae_granary.cache.errors import CacheError, CacheExistsError, NotACacheError
from sae_granary.cache.format.layout import ADDED, COMMITS, DOCUMENTS, MANIFEST, TEMPORARY
from sae_granary.cache.format.manifest import FileEntry, Manifest, ShardRecord
from sae_granary.cache.format.records import existing_manifest, load_manifest, refuse_code
from sae_granary.cache.read.added import Addition, additions, check_additions
from sae_granary.cache.remote.additions import half_pushed, remote_additions
from sae_granary.cache.remote.fetch import fetch, file_bytes, part_of
from sae_granary.cache.remote.parcel import (
    Parcel,
    check_continued,
    chosen,
    parse,
    parse_record,
    part,
    whole,
    without_activations,
)
from sae_granary.cache.remote.store import MARKER, Progress, Store, files_at_once
from sae_granary.cache.write.session import locked
from sae_granary.common import files
from sae_granary.common.files import read_regular
from sae_granary.common.quantities import byte_size
from sae_granary.common.signed import digest

STAGE = "pull"  # in TEMPORARY
WANTED = "manifest.wanted"  # in the stage: the manifest that will come


@dataclass(frozen=True)
class PullPlan:
    """A checked pull."""

    store: Store
    target: Path
    parcel: Parcel
    missing: tuple[str, ...]  # of `parcel.files`, those that are not here yet
    is_here: bool  # the cache itself
    added: tuple[PullPlan, ...] = ()  # of hook points that were added to it
    left_out: tuple[str, ...] = ()  # folders of added hook points of which a push has not finished

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.is_here and all(part.complete for part in self.added)

    @property
    def n_bytes(self) -> int:
        """Bytes of the files to fetch; `n_begun` of them are here."""
        own = sum(self.parcel.files[path].n_bytes for path in self.missing)
        return own + sum(part.n_bytes for part in self.added)

    @property
    def n_begun(self) -> int:
        """Bytes that have arrived of files that are not complete."""
        own = sum(file_bytes(part_of(self.stage / path)) or 0 for path in self.missing)
        return own + sum(part.n_begun for part in self.added)

    @property
    def written_bytes(self) -> int:
        """Bytes of the manifest, and of what a part has instead of the files at the remote."""
        own = 0 if self.is_here else sum(map(len, self.parcel.made.values())) + len(self.parcel.manifest_bytes)
        return own + sum(part.written_bytes for part in self.added)

    @property
    def disk_bytes(self) -> int:
        """Disk space that the pull still takes."""
        return self.n_bytes - self.n_begun + self.written_bytes

    @property
    def free_bytes(self) -> int:
        """Disk space that is free."""
        return files.free_bytes(self.target)

    @property
    def stage(self) -> Path:
        """Where files wait until all are there."""
        return self.target / TEMPORARY / STAGE

    @property
    def total_bytes(self) -> int:
        """Bytes of all files when everything is here."""
        return self.parcel.n_bytes + sum(part.total_bytes for part in self.added)


def remote_parcel(
    store: Store, there: Mapping[str, int], hooks: Sequence[str] = (), n_rows: int | None = None
) -> Parcel:
    """What travels of a remote cache, but for what was added to it where all of it does.

    Raises NotACacheError for half a push, or none.
    """
    if MANIFEST not in there:
        half = MARKER in there
        state = "a push has not finished there" if half else "it has no manifest.json" if there else "nothing is there"
        raise NotACacheError(f"{store.url} is not a cache to pull: {state}")
    data = store.read(MANIFEST)
    manifest = parse(data, f"{store.url}/{MANIFEST}")
    if not hooks and n_rows is None:
        return whole(manifest, data)
    found = remote_additions(store, there)
    check_additions(store.url, manifest, found)
    additions = [Addition(Path(ADDED, name), added) for name, added in found.items()]
    paths, names, parts = chosen(store.url, manifest, additions, hooks, n_rows)

    def records(of: Manifest, folder: str) -> list[ShardRecord]:
        return [parse_record(store.read(folder + path), of, f"{store.url}/{folder}{path}") for path in paths]

    added = [(p.path.as_posix(), p.manifest, records(p.manifest, f"{p.path.as_posix()}/")) for p in parts]
    return part(manifest, records(manifest, ""), names, added)


def plan_pull(
    url: str, target: Path, *, hooks: Sequence[str] = (), n_rows: int | None = None, partial: bool = False
) -> PullPlan:
    """Compare a remote cache, and what was added to it, with the folder; nothing is written.

    A `partial` pull leaves out the activations. Raises CacheError for another cache in the folder.
    """
    refuse_code(target)
    for place in (target.absolute(), *target.absolute().parents):
        if file_bytes(place) is not None:
            raise CacheError(f"{place} is a file, expected a folder: use another folder for the copy")
    store = Store(url)
    there = store.listing()
    parcel = remote_parcel(store, there, hooks, n_rows)
    plan = _plan(store, target, without_activations(parcel) if partial else parcel)
    if hooks or n_rows is not None:
        return plan
    found = remote_additions(store, there)
    check_additions(store.url, plan.parcel.manifest, found)
    here = {p.path.name: p.manifest for p in additions(target, plan.parcel.manifest)}
    check_additions(f"{url} or {target}", plan.parcel.manifest, {**here, **found})
    added = tuple(plan_pull(f"{store.url}/{ADDED}/{name}", target / ADDED / name, partial=partial) for name in found)
    return replace(plan, added=added, left_out=half_pushed(there))


def _plan(store: Store, target: Path, parcel: Parcel) -> PullPlan:
    url = store.url
    stage, complete = target / TEMPORARY / STAGE, False
    known: dict[str, FileEntry] = {}
    wanted, have = _read(stage / WANTED), _manifest(target)
    if wanted is None and have is None:
        try:
            existing_manifest(target)
        except CacheExistsError:  # unless another process has begun a pull meanwhile
            wanted, have = _read(stage / WANTED), _manifest(target)
            if wanted is None and have is None:
                raise
    if have is not None:
        if not have.complete:
            raise CacheError(f"{target} holds an unfinished harvest: use another folder; nothing was copied")
        check_continued(have, parcel.manifest, str(target), url)
        complete = _read(target / MANIFEST) == parcel.manifest_bytes
        known = dict(whole(have, b"").files)
    elif wanted not in (None, digest(parcel.manifest_bytes).encode()):
        raise CacheError(f"{target} holds half of another pull: finish that one, remove it, or use another folder")
    missing = tuple(
        path for path, entry in parcel.files.items() if not _is_here(target, stage, path, entry, known.get(path, entry))
    )
    return PullPlan(store, target, parcel, missing, complete and not missing)


def _is_here(target: Path, stage: Path, path: str, entry: FileEntry, known: FileEntry) -> bool:
    """Whether a file has arrived: it got its name after its checksum was found right."""
    return known == entry and entry.n_bytes in (file_bytes(stage / path), file_bytes(target / path))


def _read(path: Path) -> bytes | None:
    """The bytes of a small file; None where there is none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return read_regular(path)
    return None


def _manifest(target: Path) -> Manifest | None:
    with contextlib.suppress(NotACacheError):
        return load_manifest(target)
    return None


def pull(plan: PullPlan, *, progress: Progress = lambda n_bytes: None) -> None:
    """Fetch what is missing, then put everything into place. Raises CorruptCacheError for a wrong byte, RemoteError."""
    if plan.complete:
        return
    target, parcel = plan.target, plan.parcel
    if plan.disk_bytes > (free := plan.free_bytes):
        raise CacheError(f"no space for {target}: {byte_size(plan.disk_bytes)} needed, {byte_size(free)} free")
    with locked(target, make=True):
        try:
            plan = replace(_plan(plan.store, target, parcel), added=plan.added)  # again: another may have pulled
            stage = plan.stage
            stage.mkdir(parents=True, exist_ok=True)
            files.write_bytes(stage / WANTED, digest(parcel.manifest_bytes).encode())
            for addition in plan.added:  # before the cache, which has its hook points when it is there
                pull(addition, progress=progress)
            _fetch_all(plan, stage, progress)
            _place(plan, stage)
            shutil.rmtree(target / TEMPORARY, ignore_errors=True)
        except OSError as error:
            if text := files.shortage(error, target, plan.disk_bytes):
                raise CacheError(f"{text}; free some space and run the same command again: it continues") from None
            raise


def _fetch_all(plan: PullPlan, stage: Path, progress: Callable[[int], None]) -> None:
    with files_at_once() as threads:
        jobs = [
            threads.submit(fetch, plan.store, plan.parcel.place(path), plan.parcel.files[path], stage / path, progress)
            for path in plan.missing
        ]
        for job in jobs:
            job.result()
    for path, data in plan.parcel.made.items():
        (stage / path).parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(stage / path, data)


def _place(plan: PullPlan, stage: Path) -> None:
    """Move the files to their names, then the manifest."""
    paths = [path for path in (*plan.parcel.files, *plan.parcel.made) if (stage / path).exists()]
    for path in paths:
        place = plan.target / path
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(stage / path, place)
    for parent in {(plan.target / path).parent for path in paths}:
        files.sync_folder(parent)
    for folder in (*plan.parcel.manifest.layout.groups, COMMITS, DOCUMENTS):
        (plan.target / folder).mkdir(exist_ok=True)
    files.write_bytes(plan.target / MANIFEST, plan.parcel.manifest_bytes)
