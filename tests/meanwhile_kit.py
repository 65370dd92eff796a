"""Another process between any two file calls of this one: what a check saw may have changed when it is acted on."""

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

FILE_MODULES = ("posix", "nt", "io", "_io")


def meanwhile(
    act: Callable[[], object], other: Callable[[], object], start: Callable[[], object], step: int = 1
) -> Iterator[Any]:
    """What `act` returns when `other` runs, whole, before its n-th file call, for each n; `start` before each time.

    With `step`, for every step-th n only. `other` stands for a second process: only what it leaves in files matters.
    Calls of other threads are not counted.
    """
    n = 0
    while True:
        start()
        left = n

        def watch(frame: FrameType, event: str, called: Any) -> None:
            nonlocal left
            if event == "c_call" and getattr(called, "__module__", None) in FILE_MODULES:
                left -= 1
                if left < 0:
                    sys.setprofile(None)
                    other()

        sys.setprofile(watch)
        try:
            result = act()
        finally:
            sys.setprofile(None)
        if left >= 0:  # it made fewer calls
            return
        yield result
        n += step
