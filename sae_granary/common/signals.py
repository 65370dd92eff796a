"""Ctrl-C and SIGTERM stop long work cleanly: the first signal requests a stop, the second one does not wait."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

from sae_granary.common.errors import printable

_NEWLINE = "\n"
_SHOW_CURSOR = b"\x1b[?25h"


_kept: list[object] = []  # handlers that C code calls


def explain_bus_errors(explain: Callable[[], str]) -> None:
    """From now on print `explain()` on standard error before a bus error ends the process.

    The system raises one where a mapped file was truncated, and Python's own handlers would never run: the faulting
    instruction does not end. So this one is called from C, and dies by the signal as without it.
    """
    if not hasattr(signal, "SIGBUS"):
        return
    import ctypes

    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p

    def handle(signum: int) -> None:
        set_handler(signum, None)  # the default
        os.write(2, f"{printable(explain(), keep=_NEWLINE)}\n".encode())

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    _kept.append(handler)
    set_handler(int(signal.SIGBUS), ctypes.cast(handler, ctypes.c_void_p))


class Interrupted(KeyboardInterrupt):
    """A signal interrupted the work; committed work stays. `exit_code` is 130 (Ctrl-C) or 143 (SIGTERM)."""

    def __init__(self, signum: int) -> None:
        self.signum, self.exit_code = signum, 128 + signum
        super().__init__(f"interrupted by signal {signum}")


class StopRequest:
    """Whether someone asked to stop: a signal (`stop_on_signals`), or whoever sets `signum`. Work reads it.

    With `at_once` a signal raises Interrupted wherever the program is, instead of waiting until it is read.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.signum: int | None = None
        self.at_once = at_once

    def __bool__(self) -> bool:
        return self.signum is not None

    def defer(self) -> None:
        """From now on signals only set the request; the work calls `check` where it can stop."""
        self.at_once = False

    def check(self) -> None:
        """Raise Interrupted if a signal was received."""
        if self.signum is not None:
            raise Interrupted(self.signum)


@contextmanager
def stop_on_signals(*, at_once: bool = False, second: Literal["raise", "exit"] = "raise") -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM inside the block; in another thread than the main one nothing is caught.

    The second signal ends the process without any cleaning up (`second="exit"`), or, if it is Ctrl-C, raises
    Interrupted wherever the program is ("raise").
    """
    stop = StopRequest(at_once=at_once)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        asked, stop.signum = bool(stop), signum
        if asked and second == "exit":
            if sys.stderr.isatty():
                os.write(2, _SHOW_CURSOR)
            os._exit(128 + signum)
        if stop.at_once or (asked and signum == signal.SIGINT):
            raise Interrupted(signum)

    with handled_by(handle):
        yield stop


@contextmanager
def handled_by(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `handle` on SIGINT and SIGTERM inside the block; main thread only."""
    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
