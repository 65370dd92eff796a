"""Work in threads beside the main one: the next items (Prefetch), a slow end (Background), a line about a long wait.

Prefetch and Background hand the errors of their threads over to the thread that waits, and end them when closed. Lines
about what a command waits for (`waiting`) appear where the command says (`shown`); the library alone prints nothing.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Generic, TypeVar

from sae_granary.common.quantities import duration

T = TypeVar("T")
THREADS = "granary-"  # how the names of all background threads begin
_POLL_SECONDS = 0.1  # how soon a stop is seen while waiting
FIRST_SECONDS = 1.0  # before a wait is mentioned
MORE_SECONDS = 5.0  # between two lines on the progress of one wait

_shown: list[Callable[[str], None]] = []


def in_background() -> bool:
    """Whether the current thread is one of ours."""
    return threading.current_thread().name.startswith(THREADS)


class Prefetch(Generic[T]):
    """Iterates over `items` in a thread, `depth` of them ahead of the consumer.

    With depth 1, making item i + 1 starts when item i is taken. An exception of the thread is raised at the consumer,
    in order. `check` is called about ten times per second while the consumer waits, and may raise. `busy` counts the
    seconds spent on making items. `close` ends the thread and closes `items`, if it is a generator.
    """

    def __init__(self, items: Iterator[T], depth: int, check: Callable[[], None] | None = None) -> None:
        self._items, self._check = items, check
        self._queue: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
        self._permits: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(depth):
            self._permits.put(None)
        self._stopped = self._ended = False
        self.busy = 0.0
        self._thread = threading.Thread(target=self._work, name=THREADS + "prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            while True:
                self._permits.get()
                if self._stopped:
                    break
                start = time.perf_counter()
                try:
                    item = (next(self._items),)
                finally:
                    self.busy += time.perf_counter() - start
                self._queue.put(item)
                del item  # it may be large, and this thread may wait long for the next permit
        except StopIteration:
            pass
        except BaseException as error:
            self._queue.put(error)
        finally:
            if close := getattr(self._items, "close", None):
                close()
            self._queue.put(None)

    def __iter__(self) -> Prefetch[T]:
        return self

    def __next__(self) -> T:
        got = None if self._ended else self._get()
        if isinstance(got, tuple):
            self._permits.put(None)
            return got[0]
        self._ended = True
        self._thread.join()
        if got is not None:
            raise got
        raise StopIteration

    def _get(self) -> tuple[T] | BaseException | None:
        while self._check is not None:
            self._check()
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=_POLL_SECONDS)
        return self._queue.get()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After an error the thread is not waited for: it may wait for input."""
        self.close(join=kind is None)

    def close(self, *, join: bool = True) -> None:
        """Stop the thread and wait for it; items made and not taken are dropped.

        The garbage collector may call this anywhere: a SimpleQueue can be put to amid a `put` or `get` of the same
        thread, and a background thread only says that all is over, since it may be the one to be waited for.
        """
        self._ended = self._stopped = True
        self._permits.put(None)
        if join and not in_background():
            self._thread.join()


class Background(Generic[T]):
    """Calls `work(item)` in a thread for each submitted item, in order; at most one item waits.

    An error of the thread is raised by a later `submit`, or at the end; nothing is worked on after it. `check` is
    called about ten times per second while the main thread waits, and may raise.
    """

    def __init__(self, work: Callable[[T], None], check: Callable[[], None]) -> None:
        self._work, self._check = work, check
        self._pending: deque[Future[None]] = deque()  # one in work, one that waits
        self._stopped = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=THREADS + "background")

    def __enter__(self) -> Background[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After an error the item in work is finished, the waiting one dropped."""
        try:
            if kind is None:
                self._wait(0)
        finally:
            self._stopped = True
            self._thread.shutdown(cancel_futures=True)

    def submit(self, item: T) -> None:
        """Queue an item; raises what went wrong with an earlier one."""
        self._wait(1)
        self._pending.append(self._thread.submit(self._run, item))

    def _wait(self, most: int) -> None:
        """Wait until at most this many items are left."""
        while self._pending and (len(self._pending) > most or self._pending[0].done()):
            self._check()
            if wait(list(self._pending)[:1], timeout=_POLL_SECONDS).done:
                self._pending.popleft().result()
        self._check()

    def _run(self, item: T) -> None:
        if self._stopped:
            return
        try:
            self._work(item)
        except BaseException:
            self._stopped = True
            raise


@contextmanager
def shown(say: Callable[[str], None]) -> Iterator[None]:
    """Inside, `say` gets a line about each long wait (the innermost one does); another thread calls it."""
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
                say(_line(what, share[0], time.monotonic() - start))
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


def say(line: str) -> None:
    """Show a line where the command says (`shown`); nowhere in the library alone."""
    for show in _shown[-1:]:  # none, once the block is over
        show(line)
