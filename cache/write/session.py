"""Moving the files of a cache into place: synced under temporary names, linked, their folders synced."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sae_granary.cache.errors import CacheError, CacheLockedError, ConcurrentWriteError, NotACacheError
from sae_granary.cache.format.layout import COMMITS, DOCUMENTS, LOCK, MANIFEST, TEMPORARY, VOCABULARY, CacheLayout
from sae_granary.cache.format.manifest import Manifest
from sae_granary.cache.format.records import clear_uncommitted, has_records, remove_contents
from sae_granary.cache.format.signed import dump_signed
from sae_granary.cache.format.zarr_json import zarr_files
from sae_granary.cache.write.chunk_file import SYNCED_AT_ONCE
from sae_granary.common import files
from sae_granary.common.lock import FolderLock, LockedError


class Session:
    """The temporary folder of one writer of the cache at `path`, and the ways from it into the cache."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path / TEMPORARY / f"{os.getpid()}-{secrets.token_hex(4)}"

    def begin(self, manifest: Manifest, vocabulary: bytes | None, n_shards: int, *, new: bool) -> None:
        """Make the folder and what a cache of n committed shards consists of; what killed writers left is removed.

        The Zarr metadata of a complete cache stays: it describes what its manifest does until the extension finishes.
        """
        shutil.rmtree(self.path / TEMPORARY, ignore_errors=True)
        self.folder.mkdir(parents=True)
        layout = manifest.layout
        if new:
            self.put(MANIFEST, dump_signed(manifest.to_json()))
        for folder in (COMMITS, DOCUMENTS, *layout.folders):
            (self.path / folder).mkdir(exist_ok=True)
        if vocabulary is not None and not (self.path / VOCABULARY).exists():
            self.put(VOCABULARY, vocabulary)
        clear_uncommitted(self.path, layout, n_shards)
        if not manifest.complete:
            self.write_zarr(layout, n_shards)
        sync_folders([self.path, *((self.path / folder).parent for folder in layout.folders)])

    def end(self, layout: CacheLayout, *, complete: bool) -> bool:
        """Remove the folder, and what was begun of a cache where nothing was committed: True in that case."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another session's files, only where locks do nothing
            (self.path / TEMPORARY).rmdir()
        empty = not complete and not has_records(self.path)
        if empty:
            remove_contents(self.path, layout)
        return empty

    def place(self, temporary: Mapping[str, Path], record_path: str, record: bytes) -> None:
        """Link the synced files of a shard into place, then its record; undo it all where the record is not reached."""
        placed: dict[str, os.stat_result] = {}
        try:
            for path, source in temporary.items():
                before = source.stat()
                files.link_into_place(source, self.path / path)
                placed[path] = before
            sync_folders((self.path / path).parent for path in temporary)
            for path, before in placed.items():
                if not os.path.samestat(before, os.stat(self.path / path)):
                    raise FileExistsError(errno.EEXIST, "replaced by another process", str(self.path / path))
            self.put(record_path, record)
        except BaseException:
            self._take_back(placed, record_path)
            raise

    def _take_back(self, placed: Mapping[str, os.stat_result], record_path: str) -> None:
        if (self.path / record_path).exists():
            return  # the shard is committed, by us or by another
        for path, ours in placed.items():
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(ours, os.stat(self.path / path)):
                    (self.path / path).unlink()

    def write_zarr(self, layout: CacheLayout, n_shards: int, *, durable: bool = False) -> None:
        """Bring the Zarr metadata to the number of committed shards; our readers do not need it.

        Only at the end of a harvest it must be `durable`; before, each commit brings it anew.
        """
        metadata = {self.path / path: data for path, data in zarr_files(layout, n_shards).items()}
        temporary = self.folder / "new"
        for target, data in metadata.items():
            if not target.exists() or files.read_regular(target) != data:
                target.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(data)
                os.replace(temporary, target)
        if durable:
            for target in metadata:
                files.sync_file(target)
            sync_folders(target.parent for target in metadata)

    def put(self, path: str, data: bytes) -> None:
        """Write a new file; FileExistsError where there is one."""
        temporary = self.folder / "new"
        temporary.unlink(missing_ok=True)
        files.write_new(temporary, data)
        files.link_into_place(temporary, self.path / path)
        files.sync_folder((self.path / path).parent)

    def move(self, path: str, temporary: Path) -> None:
        """Put a synced file in the place of another, or where one is missing."""
        (self.path / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, self.path / path)
        files.sync_folder((self.path / path).parent)

    def replace(self, path: str, data: bytes) -> None:
        """Write a file, or another in its place."""
        (self.path / path).parent.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / "new"
        temporary.unlink(missing_ok=True)
        files.write_bytes(self.path / path, data, temporary)


def sync_folders(paths: Iterable[Path]) -> None:
    """`files.sync_folder` of each, at the same time: where it takes long, file systems make it one wait."""
    with ThreadPoolExecutor(SYNCED_AT_ONCE, "sync") as threads:
        for _ in threads.map(files.sync_folder, set(paths)):
            pass


@contextlib.contextmanager
def concurrent_writes_are_clear(path: Path) -> Iterator[None]:
    """ConcurrentWriteError where a name was taken, or our temporary file removed: by another process without a lock."""
    try:
        yield
    except CacheError:
        raise
    except (FileExistsError, FileNotFoundError) as error:
        raise ConcurrentWriteError(
            f"{path}: another process writes the same shard ({error}); stop one of the two and run the command again: "
            "it continues after the last committed shard"
        ) from error


def locked(path: Path, *, make: bool = False) -> FolderLock:
    """The lock of a cache, taken; a half-written about.json of a killed process is removed. `make` makes its folder.

    Raises CacheLockedError while another process writes, NotACacheError where there is no folder.
    """
    lock = FolderLock(path / LOCK)
    while True:
        if make:
            path.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
            break
        except LockedError as error:
            raise CacheLockedError(path, error.pid, error.age) from None
        except FileNotFoundError:  # removed by another process; ends where it is made
            if not make:
                raise NotACacheError(f"{path} does not exist any more") from None
    files.remove_temporary(path)
    return lock


def remove_leftovers(path: Path) -> None:
    """Remove what a writer left that was killed between its last write and its end."""
    left = [path / TEMPORARY, path / LOCK, *path.glob(f"{files.TEMP_PREFIX}*")]
    if not any(place.exists() for place in left):
        return
    # A read-only cache, or its writer is just about to end.
    with contextlib.suppress(OSError, CacheLockedError), locked(path):
        shutil.rmtree(path / TEMPORARY, ignore_errors=True)
