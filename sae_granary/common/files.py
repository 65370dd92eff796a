"""Durable files: written under a temporary name, synced, put into place exclusively or atomically, folder synced."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash

from sae_granary.cache.errors import DiskFullError

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


def create(path: Path) -> int:
    """A descriptor of a new file, for writing; its mode follows the umask (tempfile's would not)."""
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write every byte; os.write may write fewer."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


def write_new(path: Path, data: bytes) -> None:
    """Write a new file and sync it."""
    fd = create(path)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def link_into_place(temporary: Path, final: Path) -> None:
    """Give a finished file its name; FileExistsError if the name is taken (a rename would overwrite it)."""
    try:
        os.link(temporary, final)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(final):  # a file system without hard links: not atomic, but the lock stands before it
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final)) from None
        os.rename(temporary, final)
    else:
        os.unlink(temporary)


def replace_file(path: Path, data: bytes, temporary: Path) -> None:
    """Set the content of a file atomically: readers see the old one or the new one."""
    write_new(temporary, data)
    os.replace(temporary, path)
    sync_folder(path.parent)


def free_bytes(path: Path) -> int:
    """Bytes that this user can still write below the nearest existing folder of `path`."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


@contextlib.contextmanager
def no_space_is_clear(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into an error that says how much is missing."""
    try:
        yield
    except DiskFullError:
        raise
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise DiskFullError(path, needed_bytes, free_bytes(path)) from error


def hash_files(paths: Iterable[Path]) -> str:
    """xxh3-128 of the bytes of files, one after the other, as hex."""
    digest = xxhash.xxh3_128()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
