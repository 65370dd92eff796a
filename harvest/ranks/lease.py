"""Leases: which process works on what, in a folder that all of them see.

A lease is a file `<name>.<generation>.lease`, made by exclusive creation. Its holder renews the content; a lease that
was given back, whose process has ended on this host, or whose content has not changed for `seconds` on the observer's
own clock, is free: whoever creates the next generation has it. No clock is compared with another one, no directory is
listed, and no lock is needed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_granary.common.files import PLAIN, STALE, create

_GONE = {errno.ENOENT, STALE}
_WIDTH = 512  # bytes of a lease, so that renewing it is one write in place


def this_process() -> dict[str, Any]:
    """What tells this process from every other one: host, start of the system, container, pid, start."""
    return {
        "host": socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "container": _link("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def has_ended(process: Mapping[str, Any]) -> bool:
    """Whether a process is known to have ended: only one of this host and container can be asked for."""
    here = this_process()
    if any(process.get(name) != here[name] for name in ("host", "boot", "container")):
        return False
    pid = process.get("pid")
    if not isinstance(pid, int) or pid < 1:
        return False
    if here["started"] is None:  # no /proc
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False
    return _started(pid) != process.get("started")


def _started(pid: int) -> str | None:
    """The start of a running process in ticks since that of the system; None if it has ended or is not known."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in ("Z", "X") else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


class Lease:
    """A lease that this process holds until `release`, or until another process has taken it (`lost`)."""

    def __init__(self, fd: int, next_generation: Path, seconds: float, *, taken_over: bool) -> None:
        self._fd, self._next, self._beat = fd, next_generation, 0
        self.taken_over = taken_over  # whether another process has held it before
        self._told = {**this_process(), "seconds": seconds}
        self.seconds, self.lost = seconds, False
        self.renew(0)

    def renew(self, n_rows: int) -> None:
        """Renew it, with the number of rows harvested so far."""
        self._beat += 1
        self._write(n_rows=n_rows, beat=self._beat)
        self.lost = self.lost or os.path.exists(self._next)  # False where a network file system gives an error

    def release(self) -> None:
        """Give it back: others need not wait."""
        if self._fd >= 0:
            self._write(released=True)
            os.close(self._fd)
            self._fd = -1

    def _write(self, **more: Any) -> None:
        with contextlib.suppress(OSError):  # a lease that cannot be renewed is lost in time
            os.lseek(self._fd, 0, os.SEEK_SET)
            os.write(self._fd, json.dumps(self._told | more).encode().ljust(_WIDTH))


@dataclass
class _Seen:
    """The content of a lease, and when it was first seen, by this process' clock."""

    generation: int
    content: bytes
    since: float


class Leases:
    """The leases of a folder, as this process sees them."""

    def __init__(self, folder: Path, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self.seconds, self._clock = folder, seconds, clock
        self._seen: dict[str, _Seen] = {}

    def claim(self, name: str) -> Lease | None:
        """Take a lease; None while another process holds it."""
        if not self.is_free(name):
            return None
        seen = self._seen.get(name)
        generation = 0 if seen is None else seen.generation + 1
        try:
            fd = create(self._path(name, generation))
        except FileExistsError:  # another process was faster; its file may be seen later, where listings are stale
            self._seen[name] = _Seen(generation, b"", self._clock())
            return None
        except OSError as error:
            if error.errno in _GONE:  # the harvest has finished
                return None
            raise
        return Lease(fd, self._path(name, generation + 1), self.seconds, taken_over=generation > 0)

    def is_free(self, name: str) -> bool:
        """Whether nobody holds a lease, as far as this process can tell."""
        seen = self._look(name)
        return seen is None or self._may_take(seen)

    def exists(self, name: str) -> bool:
        """Whether anyone has ever held it."""
        return self._look(name) is not None

    def holder(self, name: str) -> str:
        """Who holds a lease, for a message."""
        seen = self._look(name)
        told = {} if seen is None else _parsed(seen.content)
        return f"process {told.get('pid')} on {told.get('host')}"

    def n_rows(self, name: str) -> int:
        """Rows that the holder has harvested, when it last renewed the lease."""
        seen = self._look(name)
        told = {} if seen is None else _parsed(seen.content)
        n_rows = told.get("n_rows")
        return n_rows if isinstance(n_rows, int) else 0

    def _path(self, name: str, generation: int) -> Path:
        return self._folder / f"{name}.{generation}.lease"

    def _look(self, name: str) -> _Seen | None:
        """The newest generation; its content is read from the file, whatever a stale listing says."""
        seen = self._seen.get(name)
        generation = 0 if seen is None else seen.generation
        found: tuple[int, bytes] | None = None
        while (content := _content(self._path(name, generation))) is not None:
            found = (generation, content)
            generation += 1
        if found is None:
            return seen
        if seen is None or (seen.generation, seen.content) != found:
            seen = self._seen[name] = _Seen(*found, self._clock())
        return seen

    def _may_take(self, seen: _Seen) -> bool:
        told = _parsed(seen.content)
        if told.get("released") is True or has_ended(told):
            return True
        seconds = told.get("seconds")
        limit = float(seconds) if isinstance(seconds, int | float) else self.seconds
        return self._clock() - seen.since > limit


def _content(path: Path) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | PLAIN)
        try:
            return os.read(fd, _WIDTH)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise


def _parsed(content: bytes) -> dict[str, Any]:
    """What a lease says; nothing where it was read while it was written, or before."""
    try:
        told = json.loads(content)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}
