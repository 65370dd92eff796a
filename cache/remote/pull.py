"""Copy a cache from remote storage: files in parallel, each checked as it arrives, the manifest last.

Files wait in the folder's `.tmp` until all are there and right; a pull that was cut off continues with them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sae_granary.cache.errors import CacheError
from sae_granary.cache.format.layout import COMMITS, DOCUMENTS, MANIFEST, TEMPORARY, commit_path
from sae_granary.cache.format.manifest import FileEntry
from sae_granary.cache.format.records import existing_manifest, load_manifest, refuse_code
from sae_granary.cache.format.signed import read_bytes
from sae_granary.cache.remote.fetch import fetch
from sae_granary.cache.remote.parcel import Parcel, check_continued, first_shards, parse, parse_record, part, whole
from sae_granary.cache.remote.store import MARKER, THREADS, Progress, Store
from sae_granary.cache.write.session import locked
from sae_granary.common import files
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
    complete: bool

    @property
    def n_bytes(self) -> int:
        """Bytes to fetch."""
        return sum(self.parcel.files[path].n_bytes for path in self.missing)


def remote_parcel(store: Store, hooks: Sequence[str] = (), n_rows: int | None = None) -> Parcel:
    """What travels of a remote cache. Raises CacheError for half a push, or none."""
    there = store.listing()
    if MANIFEST not in there:
        half = MARKER in there
        state = "a push has not finished there" if half else "it has no manifest.json" if there else "nothing is there"
        raise CacheError(f"{store.url} is not a cache to pull: {state}")
    data = store.read(MANIFEST)
    manifest = parse(data, f"{store.url}/{MANIFEST}")
    if not hooks and n_rows is None:
        return whole(manifest, data)
    shards = [commit_path(shard) for shard in range(first_shards(manifest, n_rows))]
    records = [parse_record(store.read(path), manifest, f"{store.url}/{path}") for path in shards]
    return part(manifest, records, list(hooks) or [hook.name for hook in manifest.hook_points])


def plan_pull(url: str, target: Path, *, hooks: Sequence[str] = (), n_rows: int | None = None) -> PullPlan:
    """Compare a remote cache with the folder; nothing is written. Raises CacheError for another cache in the folder."""
    refuse_code(target)
    store = Store(url)
    parcel = remote_parcel(store, hooks, n_rows)
    stage, complete = target / TEMPORARY / STAGE, False
    known: dict[str, FileEntry] = {}
    if (target / MANIFEST).exists():
        have = load_manifest(target)
        if not have.complete:
            raise CacheError(f"{target} holds an unfinished harvest: use another folder; nothing was copied")
        check_continued(have, parcel.manifest, str(target), url)
        complete = read_bytes(target / MANIFEST) == parcel.manifest_bytes
        known = dict(whole(have, b"").files)
    elif (stage / WANTED).exists():
        if (stage / WANTED).read_bytes() != digest(parcel.manifest_bytes).encode():
            raise CacheError(f"{target} holds half of another pull: finish that one, remove it, or use another folder")
    else:
        existing_manifest(target)
    missing = tuple(
        path for path, entry in parcel.files.items() if not _is_here(target, stage, path, entry, known.get(path, entry))
    )
    return PullPlan(store, target, parcel, missing, complete and not missing)


def _is_here(target: Path, stage: Path, path: str, entry: FileEntry, known: FileEntry) -> bool:
    """Whether a file has arrived: it got its name after its checksum was found right."""
    return known == entry and any(
        place.is_file() and not place.is_symlink() and place.stat().st_size == entry.n_bytes
        for place in (target / path, stage / path)
    )


def pull(plan: PullPlan, *, progress: Progress = lambda n_bytes: None) -> None:
    """Fetch what is missing, then put everything into place. Raises CorruptCacheError for a wrong byte, RemoteError."""
    if plan.complete:
        return
    target, parcel = plan.target, plan.parcel
    if plan.n_bytes > (free := files.free_bytes(target)):
        raise CacheError(f"no space for {target}: {byte_size(plan.n_bytes)} needed, {byte_size(free)} free")
    target.mkdir(parents=True, exist_ok=True)
    lock = locked(target)
    try:
        stage = target / TEMPORARY / STAGE
        stage.mkdir(parents=True, exist_ok=True)
        files.write_bytes(stage / WANTED, digest(parcel.manifest_bytes).encode())
        _fetch_all(plan, stage, progress)
        _place(plan, stage)
        shutil.rmtree(target / TEMPORARY, ignore_errors=True)
    finally:
        lock.release()


def _fetch_all(plan: PullPlan, stage: Path, progress: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            jobs = [
                pool.submit(fetch, plan.store, path, plan.parcel.files[path], stage / path, progress)
                for path in plan.missing
            ]
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
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
