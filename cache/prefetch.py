"""Run an iterator in a background thread: its next items are made while the current one is used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Iterates over what a generator yields in a thread, `depth` items ahead of the consumer.

    With depth 1, making item i + 1 starts when item i is taken. An exception of the thread is raised at the consumer,
    in order. `close` ends the thread and runs the generator's `finally`.
    """

    def __init__(self, items: Generator[T, None, None], depth: int) -> None:
        self._items = items
        self._queue: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
        self._permits = threading.Semaphore(depth)
        self._stopped = self._ended = False
        self._thread = threading.Thread(target=self._work, name="cache-prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            while self._permits.acquire() and not self._stopped:
                self._queue.put((next(self._items),))
        except StopIteration:
            pass
        except BaseException as error:
            self._queue.put(error)
        finally:
            self._items.close()
            self._queue.put(None)

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        got = None if self._ended else self._queue.get()
        if isinstance(got, tuple):
            self._permits.release()
            return got[0]
        self._ended = True
        self._thread.join()
        if got is not None:
            raise got
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it; items made and not taken are dropped."""
        self._ended = self._stopped = True
        self._permits.release()
        self._thread.join()
