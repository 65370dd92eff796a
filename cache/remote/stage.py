"""Copies of a cache's files on a disk of this machine: only the files that are read, each checked as it arrives.

Processes of one machine share the copies, divide the copying, and keep them for later runs:

    <folder>/<name of the cache>-<digest of its fingerprint>/<path of the file>-<its checksum>

The folder is that of `staging`, else of the environment variable GRANARY_STAGE. A cache that was extended, or changed,
needs other files; those are copied. Where the disk is too small, copies of caches that no process uses are removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from sae_granary.cache.errors import CacheError, CorruptCacheError
from sae_granary.cache.format.manifest import FileEntry
from sae_granary.cache.read.reader import Cache
from sae_granary.cache.remote.fetch import Copy, fetch, last_used
from sae_granary.cache.remote.shards import WHOLE, ShardFetcher, is_fetched
from sae_granary.cache.remote.store import AGAIN, Store, files_at_once
from sae_granary.common.errors import ConfigError
from sae_granary.common.files import free_bytes, shortage, user_path
from sae_granary.common.lock import FolderLock, LockedError, hold_shared, try_alone
from sae_granary.common.quantities import byte_size
from sae_granary.common.signed import digest
from sae_granary.common.threads import waiting

VARIABLE = "GRANARY_STAGE"
IN_USE = ".in-use"  # in the copies of a cache: locked by every process that reads them, touched by each that begins

Needed = Sequence[tuple[str, Cache, FileEntry]]  # path in its cache (a part that was added is one), and its record
_folder: ContextVar[str | None] = ContextVar("stage", default=None)


@contextmanager
def staging(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Context manager: trainings and analyses read from copies in this folder; None leaves that to the environment."""
    token = _folder.set(None if folder is None else str(folder))
    try:
        yield
    finally:
        _folder.reset(token)


def stage_folder() -> Path | None:
    """The folder for copies, or where it can be made; None if files are read where they are.

    Environment variables in it are replaced: nodes may have different folders. Raises ConfigError.
    """
    told = _folder.get()
    text = told or os.environ.get(VARIABLE)
    if told is None and not text:
        return None
    option = VARIABLE if told is None else "--stage"
    folder = user_path(option, os.path.expandvars(text or ""))
    if not folder.is_dir() and (os.path.lexists(folder) or not folder.parent.is_dir() or "$" in str(folder)):
        raise ConfigError(f"{option} {folder}: expected a folder on a disk of this machine; no such folder")
    return folder.resolve()


def stage(cache: Cache, needed: Needed, *, copy: bool = True, by_shard: bool = False) -> None:
    """Read these files of a cache from copies from now on; what has not been copied yet is copied first.

    With `by_shard` activations are copied when they are read (`cache.remote.shards`). Without `copy` only the space is
    checked. Does nothing without a folder for copies, or for a cache that is in it.
    Raises ConfigError for a folder in the cache, CacheError where there is no space, CorruptCacheError for a file that
    is not as recorded.
    """
    folder = stage_folder()
    if folder is None or folder in cache.path.resolve().parents:
        return
    if cache.path.resolve() in (folder, *folder.parents):
        raise ConfigError(f"--stage {folder} is in the cache {cache.path}: expected a folder outside of it")
    folder.mkdir(exist_ok=True)
    place = folder / f"{cache.path.resolve().name}-{digest(_identity(cache))[:12]}"
    place.mkdir(mode=0o700, exist_ok=True)
    _check_owner(place)
    hold_shared(place / IN_USE)
    if by_shard:
        (place / WHOLE).touch()  # locked while shards are dropped, so that no other process begins to read them
    else:
        hold_shared(place / WHOLE)
    jobs = {
        holder.path / path: Copy(holder, path, entry, place / _name(cache, holder, path, entry))
        for path, holder, entry in needed
    }
    missing: list[Copy] = []
    later: list[Copy] = []
    for job in jobs.values():
        if not job.is_here:
            (later if by_shard and is_fetched(job.path) else missing).append(job)
    if missing or later:
        _make_room(place, missing, later)
    if by_shard:
        url = f"file://{cache.path.resolve().as_posix()}"
        cache.fetcher = ShardFetcher(cache, place, url, lambda: free_bytes(place))
    if not copy:
        return
    if missing:
        try:
            _copy_all(cache, place, missing)
        except OSError as error:
            if text := shortage(error, place, sum(job.left_bytes for job in missing)):
                raise CacheError(f"{text}; free some space and run the same command again: it continues") from None
            raise
    cache.read_copies({source: job.target for source, job in jobs.items()})


def _identity(cache: Cache) -> bytes:
    return json.dumps(dict(cache.manifest.fingerprint), sort_keys=True).encode()


def _name(cache: Cache, holder: Cache, path: str, entry: FileEntry) -> str:
    below = "" if holder is cache else f"{holder.path.relative_to(cache.path).as_posix()}/"
    return f"{below}{path}-{entry.xxh3[:16]}"


def _check_owner(place: Path) -> None:
    """Refuse the copies of another user: of those that are there only the size is checked. Raises CacheError."""
    with contextlib.suppress(FileNotFoundError):  # another process has just removed it: it is made again
        if hasattr(os, "geteuid") and place.stat().st_uid != os.geteuid():
            raise CacheError(f"{place} belongs to another user: use another folder for --stage")


def _make_room(place: Path, missing: Sequence[Copy], later: Sequence[Copy] = ()) -> None:
    """Raise CacheError unless there is space; copies of other caches that nobody uses make room, the oldest first.

    They do for what is copied `later`, too, which raises nothing.
    """
    wished = sum(job.left_bytes for job in later)
    others = [found.parent for found in place.parent.glob(f"*/{IN_USE}") if found.parent != place]
    others.sort(key=lambda other: last_used(other / IN_USE))
    while (free := free_bytes(place)) < (needed := sum(job.left_bytes for job in missing)) + wished:
        if not others and free >= needed:
            return
        if not others:
            raise CacheError(
                f"no space in {place.parent} for what is read of {missing[0].holder.path}: {byte_size(needed)} needed, "
                f"{byte_size(free)} free; choose fewer hook points or another folder, or leave --stage out"
            )
        other = others.pop(0)
        with contextlib.suppress(OSError), try_alone(other / IN_USE) as alone:
            if alone:  # renamed first: a process that begins now must not find what is about to be removed
                _remove(other.rename(other.with_name(f"{other.name}.{secrets.token_hex(4)}")))


def _remove(place: Path) -> None:
    """Remove copies; the file by which they are found goes last, so that others finish what a killed process began."""
    for folder in [entry for entry in place.iterdir() if entry.is_dir()]:
        shutil.rmtree(folder)
    shutil.rmtree(place)


def _copy_all(cache: Cache, place: Path, missing: Sequence[Copy]) -> None:
    """Copy files; those that another process is copying are waited for."""
    total, stores = sum(job.entry.n_bytes for job in missing), _stores(missing)
    told = f"copying {len(missing):,} files ({byte_size(total)}) of {cache.path} to {place}"
    with waiting(told) as progress, files_at_once() as threads:
        while True:
            left, done = [], total - sum(job.entry.n_bytes for job in missing)
            for job, is_here in zip(missing, threads.map(lambda job: _copy(stores, job), missing), strict=True):
                left += [] if is_here else [job]
                done += job.entry.n_bytes if is_here else 0
                progress(done / max(total, 1))
            if not left:
                return
            missing = left
            time.sleep(AGAIN)


def _stores(jobs: Sequence[Copy]) -> Mapping[Path, Store]:
    return {path: Store(f"file://{path.resolve().as_posix()}") for path in {job.holder.path for job in jobs}}


def _copy(stores: Mapping[Path, Store], job: Copy) -> bool:
    """Copy a file unless it is there; False if another process does."""
    if job.is_here:
        return True
    job.target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FolderLock(job.target.with_name(job.target.name + ".lock")) as lock:
            lock.acquire()
            if not job.is_here:
                fetch(stores[job.holder.path], job.path, job.entry, job.target, lambda n_bytes: None)
    except LockedError:
        return False
    except CorruptCacheError:
        raise CorruptCacheError(
            f"{job.holder.path / job.path} is damaged: its checksum is not the recorded {job.entry.xxh3}; restore it "
            f"with `sae-harvest repair {job.holder.path}` or from a copy"
        ) from None
    return True
