"""Durable file operations: files are written under a temporary name, synced, and moved into place atomically."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sae_granary.common.errors import ConfigError
from sae_granary.common.quantities import byte_size

TEMP_PREFIX = ".tmp-"
# Flags that some systems lack or need: a file that is no link, bytes as they are, closed in child processes.
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
PLAIN = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # opening a FIFO would wait for its writer
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | PLAIN

NO_SPACE = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
STALE = getattr(errno, "ESTALE", -1)
_UNSUPPORTED = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
NO_LINKS = _UNSUPPORTED | {errno.EMLINK}
_NO_SYNC = _UNSUPPORTED | {errno.EACCES, errno.EINVAL, errno.EISDIR, errno.EBADF}


class NotRegularError(OSError):
    """A folder, FIFO, socket or device where a regular file was expected; it was not read."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Raises NotRegularError for anything else: reading a FIFO or a device may never end."""
    if stat.S_ISREG(os.stat(path).st_mode):
        file = os.fdopen(os.open(path, os.O_RDONLY | NO_WAIT | PLAIN), "rb")
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    kind = "a folder" if path.is_dir() else "not a regular file but a FIFO, socket or device"
    raise NotRegularError(errno.EINVAL, kind, str(path))


def read_regular(path: Path, tries: int = 3) -> bytes:
    """The bytes of a regular file (else NotRegularError), opened again where NFS calls it stale: replaced since."""
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        if error.errno != STALE or tries == 1:
            raise
    return read_regular(path, tries - 1)


def create(path: Path) -> int:
    """Return a descriptor of a new file for writing; its mode follows the umask, unlike tempfile's."""
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | PLAIN, 0o666)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all bytes; os.write may write fewer."""
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


def sync_file(path: Path) -> None:
    """Flush a file to the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, where the system allows folders to be opened and synced."""
    try:
        fd = os.open(path, _FOLDER)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def link_into_place(temporary: Path, final: Path) -> None:
    """Link a finished file to its final name. Raises FileExistsError if that exists; a rename would overwrite it."""
    try:
        os.link(temporary, final)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if os.path.lexists(final):  # a file system without hard links: not atomic, but the lock stands before it
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final)) from None
        os.rename(temporary, final)
    else:
        os.unlink(temporary)


def write_first(path: Path, data: bytes) -> None:
    """Write a file atomically and durably, unless another process has: the first one stays."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    write_new(temporary, data)
    try:
        link_into_place(temporary, path)
    except FileExistsError:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_bytes(path: Path, data: bytes, temporary: Path | None = None) -> None:
    """Write a file atomically: readers see the old content or the new one, also where several processes write it.

    `temporary` is by default beside it, under another name in each call.
    """
    temporary = temporary or path.with_name(f"{TEMP_PREFIX}{path.name}.{secrets.token_hex(4)}")
    try:
        write_new(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path`, with all its files synced, when the block succeeds."""
    temp = path.with_name(f"{TEMP_PREFIX}{path.name}")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    try:
        yield temp
        for file in sorted(p for p in temp.rglob("*") if p.is_file()):
            sync_file(file)
        for folder in [p for p in temp.rglob("*") if p.is_dir()] + [temp]:
            sync_folder(folder)
        if path.exists():
            shutil.rmtree(path)
        os.rename(temp, path)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    sync_folder(path.parent)


def remove_temporary(folder: Path) -> None:
    """Remove the temporary files of a killed process."""
    for path in folder.glob(f"{TEMP_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def free_bytes(path: Path) -> int:
    """Bytes available to this user in the nearest existing folder above `path`."""
    return shutil.disk_usage(_existing(path)).free


def _existing(path: Path) -> Path:
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def shortage(error: OSError, path: Path, needed_bytes: int | None = None) -> str | None:
    """Describe what ran out while `path` was written or opened: needed and free space; None for other errors."""
    if error.errno in NO_SPACE:
        need = "" if needed_bytes is None else f"up to {byte_size(needed_bytes)} needed, "
        full = hasattr(os, "statvfs") and (found := os.statvfs(_existing(path))).f_favail == 0 < found.f_files
        inodes = ", and no file can be added: the file system has no inode left" if full else ""
        return f"no space left for {path}: {need}{byte_size(free_bytes(path))} free{inodes}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"no file descriptor left for {error.filename or path}: raise the limit (ulimit -n)"
    return None


def hash_files(paths: Iterable[Path]) -> str:
    """xxh3-128 of the concatenated bytes of files, in hexadecimal."""
    import xxhash  # sae_core reads files where only the standard library and torch are

    digest = xxhash.xxh3_128()
    for path in paths:
        with open_regular(path) as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def user_path(option: str, text: str) -> Path:
    """A folder that a user named; `~` is the home folder: YAML, and shells in --out=~/x, leave it as it is.

    Raises ConfigError for no text, and for control characters in it.
    """
    if not text.strip():
        raise ConfigError(f"{option} is empty: expected the path of a folder")
    if any(ord(char) < 32 or ord(char) == 127 for char in text):
        raise ConfigError(f"{option} is {text!r}: it holds a newline or control character; give a plain folder name")
    return home_path(text)


def home_path(text: str | os.PathLike[str]) -> Path:
    """A path with `~` as the home folder. Raises ConfigError for `~name` of a user that there is not."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(f"{text}: there is no such user, or it has no home folder; give a whole path") from None
