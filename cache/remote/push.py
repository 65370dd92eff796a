"""Copy a local cache to remote storage: files in parallel, the manifest last. A cut-off push continues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sae_granary.cache.errors import CacheError, CorruptCacheError, UnknownNameError
from sae_granary.cache.format.documents import hash_file
from sae_granary.cache.format.layout import MANIFEST
from sae_granary.cache.format.manifest import FileEntry
from sae_granary.cache.format.records import load_record
from sae_granary.cache.format.signed import read_bytes
from sae_granary.cache.read.reader import Cache, open_cache
from sae_granary.cache.remote.parcel import Parcel, check_continued, first_shards, parse, part, whole
from sae_granary.cache.remote.store import MARKER, THREADS, Progress, Store
from sae_granary.common.signed import digest


@dataclass(frozen=True)
class PushPlan:
    """A checked push: what travels, and what of it is there already."""

    source: Path
    store: Store
    parcel: Parcel
    missing: tuple[str, ...]  # of `parcel.files`
    public: str | None  # why everyone may read it; None where that is known not to be so
    complete: bool  # nothing is left to do
    left_out: tuple[str, ...] = ()  # hook points that were added to the cache: they are not copied

    @property
    def n_bytes(self) -> int:
        """Bytes of shard files to copy."""
        return sum(self.parcel.files[path].n_bytes for path in self.missing)


def local_parcel(cache: Cache, hooks: Sequence[str] = (), n_rows: int | None = None) -> Parcel:
    """What travels of a local cache. Raises UnknownNameError for a hook point that was added: it does not."""
    own = [hook.name for hook in cache.manifest.hook_points]
    if added := [name for name in hooks if name in cache.hook_points and name not in own]:
        raise UnknownNameError(f"{cache.path}: {added[0]} was added later; push copies only {', '.join(own)}")
    if not hooks and n_rows is None:
        data = read_bytes(cache.path / MANIFEST)
        return whole(parse(data, str(cache.path)), data)
    shards = range(first_shards(cache.manifest, n_rows))
    records = [load_record(cache.path, cache.manifest, shard) for shard in shards]
    return part(cache.manifest, records, list(hooks) or own)


def plan_push(source: Path, url: str, *, hooks: Sequence[str] = (), n_rows: int | None = None) -> PushPlan:
    """Compare a cache with what is at the remote; nothing is written.

    Raises CacheError where the remote holds something else, or a newer state of the cache.
    """
    cache = open_cache(source)
    parcel, store = local_parcel(cache, hooks, n_rows), Store(url)
    own = {hook.name for hook in cache.manifest.hook_points}
    left_out = tuple(name for name in cache.hook_points if name not in own and not hooks)
    there = store.listing()
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
    missing = tuple(path for path, entry in parcel.files.items() if there.get(path) != entry.n_bytes)
    changed = (
        {p for p, e in parcel.files.items() if p.endswith("zarr.json")} if MANIFEST in there and not done else set()
    )
    missing = tuple(path for path in parcel.files if path in changed or path in missing)
    complete = done and not missing and all(there.get(path) == len(data) for path, data in parcel.made.items())
    return PushPlan(source, store, parcel, missing, store.why_public(), complete, left_out)


def push(plan: PushPlan, *, verify: bool = False, progress: Progress = lambda n_bytes: None) -> None:
    """Copy what is missing. Local files are checked before they leave; `verify` reads everything back.

    Raises CorruptCacheError for a local file that is damaged, RemoteError.
    """
    if plan.complete and not verify:
        return
    store, parcel = plan.store, plan.parcel
    if not plan.complete:
        _copy(plan, progress)
    if verify:
        entries = {**parcel.files, **{path: FileEntry.of(data) for path, data in parcel.made.items()}}
        _read_back(store, {**entries, MANIFEST: FileEntry.of(parcel.manifest_bytes)})


def _copy(plan: PushPlan, progress: Progress) -> None:
    store, parcel = plan.store, plan.parcel
    store.write(MARKER, digest(parcel.manifest_bytes).encode())

    def send(path: str) -> None:
        entry, file = parcel.files[path], plan.source / path
        if hash_file(file) != entry:
            raise CorruptCacheError(f"{file}: the checksum does not fit the manifest; nothing damaged is pushed")
        store.upload(path, file)
        progress(entry.n_bytes)

    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for _ in pool.map(send, plan.missing):
                pass
            for _ in pool.map(lambda item: store.write(*item), parcel.made.items()):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    store.write(MANIFEST, parcel.manifest_bytes)
    store.remove(MARKER)


def _read_back(store: Store, entries: Mapping[str, FileEntry]) -> None:
    from sae_granary.cache.remote.fetch import remote_entry

    with ThreadPoolExecutor(THREADS) as pool:
        for path, found in zip(
            entries, pool.map(lambda p: remote_entry(store, p, entries[p].n_bytes), entries), strict=True
        ):
            if found != entries[path]:
                raise CorruptCacheError(f"{store.url}/{path}: the bytes that arrived are not those sent; push it again")
