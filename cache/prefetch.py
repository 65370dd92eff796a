"""Run an iterator in a background thread: its next item is made while the current one is used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Iterates over what a thread makes; an exception of the thread is raised at the consumer, in order.

    The queue is unbounded: `items` itself has to wait for free buffers, and `stop` has to end that wait.
    """

    def __init__(self, items: Iterator[T], stop: Callable[[], None]) -> None:
        self._items, self._stop = items, stop
        self._queue: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="cache-prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            for item in self._items:
                self._queue.put((item, None))
            self._queue.put((None, None))
        except BaseException as error:
            self._queue.put((None, error))

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        item, error = self._queue.get()
        if item is None:
            self._ended = True
            self._thread.join()
            if error is not None:
                raise error
            raise StopIteration
        return item

    def close(self) -> None:
        """Stop the thread and wait for it; items made and not taken are dropped."""
        self._ended = True
        self._stop()
        self._thread.join()
