"""Ctrl-C and SIGTERM end a harvest cleanly; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from sae_granary.harvest.errors import InterruptedHarvest

_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
_SHOW_CURSOR = "\x1b[?25h"


class StopSignals:
    """The first signal stops, the second ends the process.

    The first one raises where the program is, or, once `defer` was called, at the next `check`.
    """

    def __init__(self) -> None:
        self._code: int | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _EXIT_CODES}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on the program asks with `check`."""
        self._deferred = True

    def check(self) -> None:
        """Raise InterruptedHarvest after a signal."""
        if self._code is not None:
            raise InterruptedHarvest(self._code)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._code is not None:
            if sys.stderr.isatty():
                os.write(2, _SHOW_CURSOR.encode())
            os._exit(_EXIT_CODES[signal.Signals(number)])
        self._code = _EXIT_CODES[signal.Signals(number)]
        if not self._deferred:
            self.check()
