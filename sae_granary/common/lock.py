"""A lock on a folder that ends with its process.

flock does nothing on some network file systems, so the lock is advice with a clear message; data stays whole because
finished files are linked into place exclusively (`common.files.link_into_place`). Without flock, filelock's soft lock
is used: a file with the process id, removed once that process has ended.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_granary.common.errors import GranaryError
from sae_granary.common.files import NO_FOLLOW, PLAIN, NotRegularError
from sae_granary.common.quantities import duration

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_shared: dict[Path, int] = {}  # descriptors of the lock files that this process holds together with others
_NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS}


class LockedError(GranaryError):
    """Another process uses a folder; `pid` and `age` (seconds) are None if unknown."""

    def __init__(self, folder: Path, pid: int | None, age: float | None) -> None:
        self.folder, self.pid, self.age = folder, pid, age
        super().__init__(f"{folder} is in use by {self.holder}")

    @property
    def holder(self) -> str:
        """Description of the other process."""
        who = "another process" if self.pid is None else f"process {self.pid}"
        return who if self.age is None else f"{who}, for {duration(self.age)}"


def lock_holder(path: Path) -> str | None:
    """A description of the process that holds a lock file; None if no process does, or if that is not known."""
    if fcntl is None:
        return LockedError(path.parent, *_soft_holder(path)).holder if path.exists() else None
    try:
        fd = os.open(path, os.O_RDONLY | PLAIN | NO_FOLLOW | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        held = error.errno in {errno.EWOULDBLOCK, errno.EACCES}
        return LockedError(path.parent, *_holder(fd)).holder if held else None
    finally:
        os.close(fd)
    return None


class FolderLock:
    """The lock file of a folder, held from `acquire` to `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        self._soft: Any = None

    def acquire(self) -> None:
        """Take the lock or raise LockedError with the holder's pid and the seconds since it started."""
        if fcntl is None:
            self._acquire_soft()
        else:
            self._acquire_flock()

    def release(self) -> None:
        """Remove the lock file and release the lock; does nothing if it is not held."""
        if self._soft is not None:
            self._soft.release()
            self._soft = None
        if self._fd < 0:
            return
        if _is_current(self._fd, self.path):
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
        os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _acquire_flock(self) -> None:
        while True:
            fd = os.open(self.path, os.O_CREAT | os.O_RDWR | PLAIN | NO_FOLLOW, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in {errno.EWOULDBLOCK, errno.EACCES}:
                    pid, age = _holder(fd)
                    os.close(fd)
                    raise LockedError(self.path.parent, pid, age) from None
                if error.errno not in _NO_LOCKS:
                    os.close(fd)
                    raise
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise NotRegularError(errno.EINVAL, "not a regular file: remove it", str(self.path))
            if _is_current(fd, self.path):
                break
            os.close(fd)  # the former holder removed it between our open and our lock
        self._fd = fd
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps({"pid": os.getpid(), "started": time.time()}).encode(), 0)

    def _acquire_soft(self) -> None:
        import filelock

        soft = filelock.SoftFileLock(self.path, thread_local=False)
        try:
            soft.acquire(timeout=0)
        except filelock.Timeout:
            raise LockedError(self.path.parent, *_soft_holder(self.path)) from None
        self._soft = soft


def hold_shared(path: Path) -> None:
    """Hold a lock file, together with other processes, until this one ends; its folder is made, its time is now.

    `try_alone` then reports it as in use. Without flock it is only made.
    """
    while path not in _shared or not _is_current(_shared[path], path):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            fd = os.open(path, os.O_CREAT | os.O_RDWR | PLAIN | NO_FOLLOW, 0o666)
        except FileNotFoundError:  # the folder was removed between the two
            continue
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_SH)  # waits for one that removes the folder
        if path in _shared:
            os.close(_shared.pop(path))
        _shared[path] = fd
    os.utime(path)


def hold(path: Path) -> int | None:
    """Hold a file, together with others, until the descriptor is closed; its time is now.

    None if there is no such file, or it is being removed. `try_alone` then reports it as in use.
    """
    try:
        fd = os.open(path, os.O_RDONLY | PLAIN | NO_FOLLOW)
    except FileNotFoundError:
        return None
    try:
        if fcntl is not None:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(fd)
            return None
    if not _is_current(fd, path):
        os.close(fd)
        return None
    os.utime(path)
    return fd


@contextmanager
def try_alone(path: Path, *, unknown: bool = False) -> Iterator[bool]:
    """Context manager: whether no process holds a file (`hold`, `hold_shared`); none can while the block runs.

    `unknown` without flock.
    """
    fd = os.open(path, os.O_RDWR | PLAIN | NO_FOLLOW)
    try:
        if fcntl is None:
            yield unknown
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield _is_current(fd, path)
    finally:
        os.close(fd)


def _is_current(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(fd: int) -> tuple[int | None, float | None]:
    try:
        body = json.loads(os.pread(fd, 4096, 0))
        return int(body["pid"]), max(0.0, time.time() - float(body["started"]))
    except (ValueError, KeyError, TypeError):  # taken a moment ago, or written by something else
        return None, None


def _soft_holder(path: Path) -> tuple[int | None, float | None]:
    """The pid in the first line of filelock's file."""
    try:
        pid = int(path.read_text(encoding="utf-8").split()[0])
        return pid, max(0.0, time.time() - path.stat().st_mtime)
    except (OSError, ValueError, IndexError):
        return None, None
