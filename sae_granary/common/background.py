"""Two threads beside the forward pass: one makes the next work, one writes what is done.

Both hand errors over to the main thread, and both end when it stops.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
_POLL_SECONDS = 0.1  # how soon a stop is seen while waiting
_END = object()


class Prefetch(Generic[T]):
    """Iterates `source` in a thread, at most `depth` items ahead; `busy` counts its working seconds."""

    def __init__(self, source: Iterator[T], depth: int, check: Callable[[], None]) -> None:
        self._source, self._check = source, check
        self._queue: queue.Queue[object] = queue.Queue(depth)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self.busy = 0.0
        self._thread = threading.Thread(target=self._run, name="harvest-prefetch", daemon=True)

    def __enter__(self) -> Prefetch[T]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if kind is None:
            self._thread.join()

    def __iter__(self) -> Iterator[T]:
        while True:
            self._check()
            try:
                item = self._queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if item is _END:
                if self._error is not None:
                    raise self._error
                return
            yield item  # type: ignore[misc]

    def _run(self) -> None:
        try:
            start = time.perf_counter()
            for item in self._source:
                self.busy += time.perf_counter() - start
                if not self._put(item):
                    return
                start = time.perf_counter()
            self.busy += time.perf_counter() - start
        except BaseException as error:  # handed over to the main thread
            self._error = error
        self._put(_END)

    def _put(self, item: object) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False


class Background(Generic[T]):
    """Calls `work(item)` in a thread for each submitted item, in order; at most one item waits."""

    def __init__(self, work: Callable[[T], None], check: Callable[[], None]) -> None:
        self._work, self._check = work, check
        self._queue: queue.Queue[object] = queue.Queue(1)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="harvest-writer", daemon=True)

    def __enter__(self) -> Background[T]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an error the item in work is finished, the waiting one dropped."""
        if kind is None:
            self._hand_over(_END)
        else:
            self._stop.set()
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def submit(self, item: T) -> None:
        """Queue an item; raises what went wrong with an earlier one."""
        self._hand_over(item)

    def _hand_over(self, item: object) -> None:
        while True:
            if self._error is not None:
                raise self._error
            self._check()
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
                return
            except queue.Full:
                continue

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                item = self._queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if item is _END:
                return
            try:
                self._work(item)  # type: ignore[arg-type]
            except BaseException as error:  # handed over to the main thread
                self._error = error
                return
