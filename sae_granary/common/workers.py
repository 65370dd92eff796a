"""Calls made ahead by background threads; who waits for one makes the next ones meanwhile."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from sae_granary.common.prefetch import THREADS, in_background

T = TypeVar("T")


class Workers:
    """Threads that make calls in the order of `submit`; who asks for a result helps them, so that no core idles.

    Waiting for a call that a thread has just begun takes as long as making the one after it, and a hand-over between
    threads is then saved.
    """

    def __init__(self, n_threads: int) -> None:
        self._n_threads = n_threads
        self._threads: list[threading.Thread] = []  # started by the first `submit`
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def submit(self, call: Callable[[], T]) -> Callable[[], T]:
        """Have a call made; what is returned waits for its result, or raises what it raised."""
        while len(self._threads) < self._n_threads:
            name = f"{THREADS}copy-{len(self._threads)}"
            self._threads.append(threading.Thread(target=self._work, name=name, daemon=True))
            self._threads[-1].start()
        future: Future[T] = Future()

        def make() -> None:
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
                if not isinstance(error, Exception):
                    raise  # an interrupt belongs to the thread that it met, too

        self._calls.put(make)
        return lambda: self._result(future)

    def _result(self, future: Future[T]) -> T:
        while not future.done():
            try:
                make = self._calls.get_nowait()
            except queue.Empty:
                break
            if make is None:  # closed: the end of a thread
                self._calls.put(None)
                break
            make()
        return future.result()

    def _work(self) -> None:
        while (make := self._calls.get()) is not None:
            make()
            del make  # it holds the result, and this thread may wait long for the next call

    def close(self) -> None:
        """Drop the calls that no thread has begun, end the threads and wait for them.

        The garbage collector may call this in a background thread: that one does not wait.
        """
        try:
            while True:
                self._calls.get_nowait()
        except queue.Empty:
            pass
        for _ in self._threads:
            self._calls.put(None)
        if not in_background():
            for thread in self._threads:
                if thread.is_alive():  # an interrupt may have come before its start
                    thread.join()
