"""One writer at a time: a lock that ends with its process.

flock does nothing on some network file systems, so the lock is advice and a clear message; what keeps data whole is
that shards and records are put into place exclusively (`common.files.link_into_place`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from pathlib import Path

from sae_granary.cache.errors import CacheLockedError


class CacheLock:
    """The lock file of a cache, held until `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def acquire(self) -> None:
        """Take the lock or raise CacheLockedError with the holder's pid and the seconds since it started."""
        while True:
            fd = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in {errno.EWOULDBLOCK, errno.EACCES}:
                    pid, age = _holder(fd)
                    os.close(fd)
                    raise CacheLockedError(self.path.parent, pid, age) from None
                if error.errno not in {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS}:
                    os.close(fd)
                    raise
            if self._is_current(fd):
                break
            os.close(fd)  # the former holder removed it between our open and our lock
        self._fd = fd
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps({"pid": os.getpid(), "started": time.time()}).encode(), 0)

    def release(self) -> None:
        """Remove the lock file and let go; nothing when the lock is not held."""
        if self._fd < 0:
            return
        if self._is_current(self._fd):
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
        os.close(self._fd)
        self._fd = -1

    def _is_current(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.path))
        except FileNotFoundError:
            return False


def _holder(fd: int) -> tuple[int | None, float | None]:
    try:
        body = json.loads(os.pread(fd, 4096, 0))
        return int(body["pid"]), max(0.0, time.time() - float(body["started"]))
    except (ValueError, KeyError, TypeError):  # taken a moment ago, or written by something else
        return None, None
