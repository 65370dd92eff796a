"""Lines that say what a command waits for, once it takes longer than a second.

A command chooses where the lines appear (`shown`); the library alone prints nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sae_granary.common.quantities import duration
from sae_granary.common.threads import THREADS

FIRST_SECONDS = 1.0  # before a wait is mentioned
MORE_SECONDS = 5.0  # between two lines on the progress of one wait

_shown: list[Callable[[str], None]] = []


@contextmanager
def shown(say: Callable[[str], None]) -> Iterator[None]:
    """Inside, `say` gets a line about each long wait; it is called by another thread."""
    _shown.append(say)
    try:
        yield
    finally:
        _shown.remove(say)


@contextmanager
def waiting(what: str) -> Iterator[Callable[[float], None]]:
    """Mention `what` ("counting rows") if the block takes longer than a second.

    Call what the context gives with the share that is done (0 to 1): then the progress and the time left follow.
    """
    if not _shown:
        yield lambda share: None
        return
    share, over = [0.0], threading.Event()

    def work() -> None:
        start, pause = time.monotonic(), FIRST_SECONDS
        while not over.wait(pause):
            if share[0] or pause == FIRST_SECONDS:  # one line where there is no progress to tell
                _say(_line(what, share[0], time.monotonic() - start))
            pause = MORE_SECONDS

    thread = threading.Thread(target=work, name=THREADS + "waiting", daemon=True)
    thread.start()
    try:
        yield lambda done: share.__setitem__(0, done)
    finally:
        over.set()
        thread.join()


def _line(what: str, share: float, seconds: float) -> str:
    return f"{what}: {share:.0%}, {duration(seconds * (1 - share) / share)} left" if share else f"{what} ..."


def _say(line: str) -> None:
    for say in tuple(_shown):
        say(line)
