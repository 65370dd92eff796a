"""Run an iterator in a background thread: its next items are made while the current one is used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from typing import Generic, TypeVar

T = TypeVar("T")
THREADS = "cache-"  # how the names of all background threads of loaders begin


def in_background() -> bool:
    """Whether this is a thread of some loader."""
    return threading.current_thread().name.startswith(THREADS)


class Prefetcher(Generic[T]):
    """Iterates over what a generator yields in a thread, `depth` items ahead of the consumer.

    With depth 1, making item i + 1 starts when item i is taken. An exception of the thread is raised at the consumer,
    in order. `close` ends the thread and runs the generator's `finally`.
    """

    def __init__(self, items: Generator[T, None, None], depth: int) -> None:
        self._items = items
        self._queue: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
        self._permits: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(depth):
            self._permits.put(None)
        self._stopped = self._ended = False
        self._thread = threading.Thread(target=self._work, name=THREADS + "prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            while True:
                self._permits.get()
                if self._stopped:
                    break
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
            self._permits.put(None)
            return got[0]
        self._ended = True
        self._thread.join()
        if got is not None:
            raise got
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it; items made and not taken are dropped.

        The garbage collector may call this anywhere: a SimpleQueue can be put to amid a `put` or `get` of the same
        thread, and a background thread only says that all is over, since it may be the one to be waited for.
        """
        self._ended = self._stopped = True
        self._permits.put(None)
        if not in_background():
            self._thread.join()
