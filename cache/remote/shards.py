"""Shards that are fetched when a loader comes to them, one group ahead, and dropped where others need their space.

Of the cache everything but activations (and their scales) is here from the start. A file gets its name after its
checksum was found right, and is held by a shared lock while a loader may read it: processes of a machine share the
copies, and only what none of them reads is dropped, that used longest ago first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from sae_granary.cache.errors import CacheError, CacheLockedError
from sae_granary.cache.format.layout import SCALES
from sae_granary.cache.read.check import Enter
from sae_granary.cache.read.reader import Cache
from sae_granary.cache.remote.fetch import Copy, fetch, file_bytes, last_used, part_of
from sae_granary.cache.remote.store import AGAIN, RemoteError, Store, files_at_once
from sae_granary.cache.write.session import locked
from sae_granary.common.files import shortage
from sae_granary.common.lock import hold, try_alone
from sae_granary.common.quantities import byte_size
from sae_granary.common.threads import THREADS, in_background, waiting

WHOLE = ".whole"  # in copies, locked by processes that read files of them which they do not hold one by one
_REMEDY = "lower --shuffle-shards, raise GRANARY_REMOTE_BYTES, or free disk space"
_NUMBERS = {2: "two", 3: "three"}


def is_fetched(path: str) -> bool:
    """Whether a path in a cache is one of what is fetched shard by shard."""
    return path.partition("/")[0] in ("activations", SCALES)


class ShardFetcher:
    """Fetches shards of a cache to a folder of this machine, where `free` bytes may be written."""

    def __init__(self, cache: Cache, folder: Path, url: str, free: Callable[[], int]) -> None:
        self._cache, self._folder, self._url, self._free = cache, folder, url, free
        self.stopped: Callable[[], bool] = lambda: False
        self._mapped = cache.column("flags").map(0)  # by which other processes see that the copy is in use

    def check(self, hooks: Sequence[str], n_shards: int, n_groups: int = 2) -> None:
        """Raise CacheError unless so many groups of n shards fit: that which is read, and the next one."""
        sizes = [
            sum(
                array.shard_bytes(shard.n_rows)
                for hook in hooks
                for array in self._cache.holder(hook).layout.late(hook)
            )
            for shard in self._cache.shards
        ]
        needed = sum(sorted(sizes, reverse=True)[: n_groups * n_shards])
        while needed > self._room():
            try:
                with locked(self._folder):
                    room = self._room()
            except CacheLockedError:  # files came and went while they were counted
                time.sleep(AGAIN)
                continue
            if needed > room:
                raise CacheError(
                    f"{_NUMBERS[n_groups]} groups of {n_shards} shards of {self._url} take {byte_size(needed)}, "
                    f"{byte_size(max(room, 0))} are left for copies in {self._folder}: {_REMEDY}"
                )

    def _room(self) -> int:
        """Bytes that copies may take, those that are here included."""
        return self._free() + sum(file_bytes(path) or 0 for path in self._copies())

    @contextmanager
    def reading(self, hooks: Sequence[str], closed: Callable[[], bool]) -> Iterator[Enter]:
        """Context manager: gives what a loader calls before it reads a group of shards, with that group and the next.

        It returns when the first are here. Raises RemoteError, CorruptCacheError, CacheError where they do not fit, and
        soon after the loader was `closed`.
        """
        reader = _Reader(self, hooks, lambda: closed() or self.stopped())
        try:
            yield reader.enter
        finally:
            reader.close()

    def files(self, hooks: Sequence[str], shards: Iterable[int]) -> list[Copy]:
        """What is fetched of opened shards."""
        found = []
        for i in shards:
            number = self._cache.shards[i].index
            for hook in hooks:
                holder = self._cache.holder(hook)
                entries = holder.records[number].files
                for array in holder.layout.late(hook):
                    path = array.shard_path(number)
                    found.append(Copy(holder, path, entries[path], holder.place_of(path)))
        return found

    def fetch(self, files: Sequence[Copy], is_done: Callable[[Copy], bool], stopped: Callable[[], bool]) -> None:
        """Fetch files until each is done; one process at a time does, so that they share the space."""
        while missing := [file for file in files if not is_done(file)]:
            try:
                lock = locked(self._folder)
            except CacheLockedError:
                time.sleep(AGAIN)
                _raise_if(stopped)
                continue
            try:
                missing = [file for file in missing if not file.is_here]
                self._make_room(missing, {place for file in files for place in (file.target, part_of(file.target))})
                self._fetch_all(missing, stopped)
            except OSError as error:
                if isinstance(error, RemoteError) or not (text := shortage(error, self._folder)):
                    raise
                raise CacheError(text) from None
            finally:
                lock.release()

    def _fetch_all(self, missing: Sequence[Copy], stopped: Callable[[], bool]) -> None:
        places = {file.holder.path for file in missing}
        stores = {
            p: Store(f"{self._url}/{p.relative_to(self._cache.path).as_posix()}".removesuffix("/.")) for p in places
        }
        with files_at_once(THREADS + "fetch") as threads:
            jobs = [
                threads.submit(fetch, stores[f.holder.path], f.path, f.entry, f.target, lambda n: _raise_if(stopped))
                for f in missing
            ]
            for job in jobs:
                job.result()

    def _make_room(self, missing: Sequence[Copy], kept: Collection[Path]) -> None:
        needed, free = sum(file.left_bytes for file in missing), self._free()
        others = [path for path in self._copies() if path not in kept] if free < needed else []
        others.sort(key=last_used, reverse=True)
        with try_alone(self._folder / WHOLE) if (self._folder / WHOLE).exists() else nullcontext(True) as no_others:
            while no_others and others and free < needed:
                with suppress(FileNotFoundError), try_alone(path := others.pop()) as alone:
                    if alone:
                        n_bytes = file_bytes(path) or 0
                        path.unlink()
                        free += n_bytes
        if free < needed:
            raise CacheError(
                f"no space in {self._folder} for the next shards of {self._url}: {byte_size(needed)} needed, "
                f"{byte_size(max(free, 0))} free: {_REMEDY}"
            )

    def _copies(self) -> list[Path]:
        """Every file that was fetched, and what has arrived of others."""
        found: list[Path] = []
        for folder, _, names in os.walk(self._folder):
            if any(map(is_fetched, Path(folder).relative_to(self._folder).parts)):
                found += [Path(folder, name) for name in names if name.startswith("c.") and not name.endswith(".lock")]
        return found


class _Stopped(CacheError):
    """The loader was closed, or the training stopped, while it fetched."""


class _Reader:
    """A loader's place among the groups: that which it reads is held, the next one is fetched meanwhile."""

    def __init__(self, fetcher: ShardFetcher, hooks: Sequence[str], stopped: Callable[[], bool]) -> None:
        self._fetcher, self._hooks, self._left = fetcher, hooks, False
        self._stopped = lambda: self._left or stopped()
        self._now: list[int] = []
        self._held: dict[Path, int] = {}
        self._ahead = Future[None]()
        self._ahead.set_result(None)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=THREADS + "ahead")

    def enter(self, now: Iterable[int], after: Iterable[int]) -> None:
        """See `ShardFetcher.reading`."""
        if self._now == (now := list(now)):
            return
        with waiting("waiting for the next shards of the cache"):
            wait([self._ahead])  # what went wrong there is tried again
            files = self._fetcher.files(self._hooks, now)
            self._release({file.target for file in files})
            self._fetcher.fetch(files, self._hold, self._stopped)
        self._now, coming = now, self._fetcher.files(self._hooks, after)
        self._ahead = self._thread.submit(self._fetcher.fetch, coming, lambda file: file.is_here, self._stopped)

    def _hold(self, file: Copy) -> bool:
        if file.target not in self._held:
            descriptor = hold(file.target) if file.is_here else None
            if descriptor is None:
                return False
            self._held[file.target] = descriptor
        return True

    def _release(self, kept: Collection[Path] = ()) -> None:
        for path in [path for path in self._held if path not in kept]:
            os.close(self._held.pop(path))

    def close(self) -> None:
        """Fetch no more. What is being fetched stops at its next block, and continues there later."""
        self._left = True
        self._thread.shutdown(wait=not in_background(), cancel_futures=True)
        self._release()


def _raise_if(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise _Stopped("stopped while shards were fetched")
