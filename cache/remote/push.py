"""Copy a local cache to remote storage: files in parallel, the manifest last. A cut-off push continues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sae_granary.cache.errors import CacheError, CorruptCacheError
from sae_granary.cache.format.documents import hash_file
from sae_granary.cache.format.layout import ADDED, MANIFEST
from sae_granary.cache.format.manifest import FileEntry
from sae_granary.cache.format.records import load_record
from sae_granary.cache.format.signed import read_bytes
from sae_granary.cache.read.added import check_additions
from sae_granary.cache.read.reader import Cache, open_local
from sae_granary.cache.remote.additions import remote_additions
from sae_granary.cache.remote.fetch import remote_entry
from sae_granary.cache.remote.parcel import Added, Parcel, check_continued, chosen, parse, part, whole
from sae_granary.cache.remote.store import MARKER, Progress, Store, files_at_once
from sae_granary.common.signed import digest


@dataclass(frozen=True)
class PushPlan:
    """A checked push: what travels, and what of it is there already."""

    source: Path
    store: Store
    parcel: Parcel
    missing: tuple[str, ...]  # of `parcel.files`
    public: str | None  # why everyone may read it; None where that is known not to be so
    is_there: bool  # the cache itself: nothing of it is left to do
    added: tuple[PushPlan, ...] = ()  # of hook points that were added to it

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.is_there and all(part.complete for part in self.added)

    @property
    def n_bytes(self) -> int:
        """Bytes of shard files to copy."""
        own = sum(self.parcel.files[path].n_bytes for path in self.missing)
        return own + sum(part.n_bytes for part in self.added)


def local_parcel(cache: Cache, hooks: Sequence[str] = (), n_rows: int | None = None) -> Parcel:
    """What travels of a local cache, but for what was added to it where all of it does."""
    if not hooks and n_rows is None:
        data = read_bytes(cache.path / MANIFEST)
        return whole(parse(data, str(cache.path)), data)
    manifest = cache.manifest
    paths, names, parts = chosen(str(cache.path), manifest, cache.additions, hooks, n_rows)
    added: list[Added] = [
        (
            part.path.relative_to(cache.path).as_posix(),
            part.manifest,
            [load_record(part.path, part.manifest, shard) for shard in range(len(paths))],
        )
        for part in parts
    ]
    records = [load_record(cache.path, manifest, shard) for shard in range(len(paths))]
    return part(manifest, records, names, added)


def plan_push(source: Path, url: str, *, hooks: Sequence[str] = (), n_rows: int | None = None) -> PushPlan:
    """Compare a cache, and what was added to it, with what is at the remote; nothing is written.

    Raises CacheError where the remote holds something else, or a newer state of the cache.
    """
    cache, store = open_local(source), Store(url)
    parts = [] if hooks or n_rows is not None else [found for found in cache.additions if found.manifest.complete]
    there = store.listing()
    plan = _plan(source, store, there, local_parcel(cache, hooks, n_rows))
    here = {addition.path.name: addition.manifest for addition in parts}
    check_additions(f"{source} or {url}", cache.manifest, {**remote_additions(store, there), **here})
    return replace(plan, added=tuple(plan_push(source / ADDED / name, f"{store.url}/{ADDED}/{name}") for name in here))


def _plan(source: Path, store: Store, there: Mapping[str, int], parcel: Parcel) -> PushPlan:
    url = store.url
    done = False
    if MANIFEST in there:
        data = store.read(MANIFEST)
        check_continued(parse(data, f"{url}/{MANIFEST}"), parcel.manifest, url, str(source))
        done = data == parcel.manifest_bytes
    elif there:
        marker = store.read(MARKER).decode("ascii", "replace") if MARKER in there else None
        if marker is None:
            raise CacheError(f"{url} holds something that is not a cache ({min(there)}): use another URL")
        if marker != digest(parcel.manifest_bytes):
            raise CacheError(f"{url} holds half of another push: finish that one, or use another URL")
    longer = MANIFEST in there and not done  # then Zarr metadata may differ in files of equal size
    missing = tuple(
        path
        for path, entry in parcel.files.items()
        if there.get(path) != entry.n_bytes or (longer and path.endswith("zarr.json"))
    )
    is_there = done and not missing and all(there.get(path) == len(data) for path, data in parcel.made.items())
    return PushPlan(source, store, parcel, missing, store.why_public(), is_there)


def push(plan: PushPlan, *, verify: bool = False, progress: Progress = lambda n_bytes: None) -> None:
    """Copy what is missing, added hook points first. Local files are checked; `verify` reads everything back.

    Raises CorruptCacheError for a local file that is damaged, RemoteError.
    """
    if plan.complete and not verify:
        return
    store, parcel = plan.store, plan.parcel
    if not plan.is_there:
        store.write(MARKER, digest(parcel.manifest_bytes).encode())
    for addition in plan.added:
        push(addition, verify=verify, progress=progress)
    if not plan.is_there:
        _copy(plan, progress)
    if verify:
        entries = {**parcel.files, **{path: FileEntry.of(data) for path, data in parcel.made.items()}}
        _read_back(store, {**entries, MANIFEST: FileEntry.of(parcel.manifest_bytes)})


def _copy(plan: PushPlan, progress: Progress) -> None:
    store, parcel = plan.store, plan.parcel

    def send(path: str) -> None:
        entry, file = parcel.files[path], plan.source / parcel.place(path)
        if hash_file(file) != entry:
            raise CorruptCacheError(f"{file}: the checksum does not fit the manifest; nothing damaged is pushed")
        store.upload(path, file)
        progress(entry.n_bytes)

    with files_at_once() as threads:
        for _ in threads.map(send, plan.missing):
            pass
        for _ in threads.map(store.write, parcel.made, parcel.made.values()):
            pass
    store.write(MANIFEST, parcel.manifest_bytes)
    store.remove(MARKER)


def _read_back(store: Store, entries: Mapping[str, FileEntry]) -> None:
    with files_at_once() as threads:
        there = threads.map(lambda path: remote_entry(store, path, entries[path].n_bytes), entries)
        for path, found in zip(entries, there, strict=True):
            if found != entries[path]:
                raise CorruptCacheError(f"{store.url}/{path}: the bytes that arrived are not those sent; push it again")
