"""Fetch one file in blocks: failed blocks are repeated, a file that was cut off continues, a checksum decides."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from sae_granary.cache.format.documents import hash_file
from sae_granary.cache.format.manifest import FileEntry
from sae_granary.cache.read.reader import Cache
from sae_granary.cache.remote.store import Store, damaged

BLOCK_BYTES = 8 << 20
TRIES = 3  # of a whole file whose checksum does not fit


def fetch(store: Store, path: str, entry: FileEntry, target: Path, progress: Callable[[int], None]) -> None:
    """Write a remote file to `target`, which appears only once its bytes are right.

    Raises CorruptCacheError where they never are, RemoteError.
    """
    part = part_of(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(TRIES):
        start = file_bytes(part) or 0
        if start > entry.n_bytes:
            part.unlink()
            start = 0
        progress(start)
        done = start
        with part.open("ab") as file:
            for block in _blocks(store, path, start, entry.n_bytes):
                file.write(block)
                done += len(block)
                progress(len(block))
            file.flush()
            os.fsync(file.fileno())
        if hash_file(part) == entry:
            os.replace(part, target)
            return
        part.unlink()
        progress(-done)
    raise damaged(f"{store.url}/{path}")


def file_bytes(path: Path) -> int | None:
    """Bytes of a regular file; None where there is none, links included."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        status = path.lstat()
        return status.st_size if stat.S_ISREG(status.st_mode) else None
    return None


def last_used(path: Path) -> float:
    """The time of a file or folder, which those who use it set; 0 where another process has removed it."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def part_of(target: Path) -> Path:
    """Where the bytes of a file are until it is complete."""
    return target.with_name(target.name + ".part")


@dataclass(frozen=True)
class Copy:
    """A file of a cache, and where it is copied to."""

    holder: Cache
    path: str
    entry: FileEntry
    target: Path

    @property
    def is_here(self) -> bool:
        """Whether it has arrived: it got its name after its checksum was found right."""
        return file_bytes(self.target) == self.entry.n_bytes

    @property
    def left_bytes(self) -> int:
        """Bytes that have not arrived."""
        begun = file_bytes(part_of(self.target))
        return 0 if begun is None and self.is_here else max(0, self.entry.n_bytes - (begun or 0))


def remote_entry(store: Store, path: str, n_bytes: int) -> FileEntry:
    """Size and checksum of a remote file, as its bytes arrive here."""
    hasher = xxhash.xxh3_128()
    for block in _blocks(store, path, 0, n_bytes):
        hasher.update(block)
    return FileEntry(n_bytes, hasher.hexdigest())


def _blocks(store: Store, path: str, start: int, n_bytes: int) -> Iterator[bytes]:
    for first in range(start, n_bytes, BLOCK_BYTES):
        yield store.read(path, first, min(first + BLOCK_BYTES, n_bytes))
