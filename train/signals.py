"""SIGTERM and SIGINT: stop after the current step; a second SIGINT stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from sae_granary.train.errors import InterruptedRunError


class StopRequest:
    """Set by a signal handler, read by the loop."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None

    def check(self, step: int, folder: Path) -> None:
        """Raises InterruptedRunError if a stop was asked for."""
        if self.signum is not None:
            raise InterruptedRunError(self.signum, step, folder)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch the signals for a while; in another thread than the main one nothing is caught."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        if request and signum == signal.SIGINT:
            raise KeyboardInterrupt
        request.signum = signum

    previous = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
