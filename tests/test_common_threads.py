"""Items and calls made ahead by threads, and work left to one."""

import threading
import time

import pytest

from sae_granary.common import threads
from sae_granary.common.threads import Background, Prefetch, shown, waiting


def test_items_are_made_ahead_and_no_further() -> None:
    made: list[int] = []

    def items():
        for i in range(10):
            made.append(i)
            yield i

    with Prefetch(items(), 2) as ahead:
        for i in range(3):
            assert next(ahead) == i
        deadline = time.monotonic() + 30
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert made == [0, 1, 2, 3, 4]
    assert not ahead._thread.is_alive()


def test_an_error_comes_after_the_items_before_it_and_the_generator_is_closed() -> None:
    closed = []

    def items():
        try:
            yield 1
            yield 1 // 0
        finally:
            closed.append(True)

    with Prefetch(items(), 1, check=lambda: None) as ahead:
        assert next(ahead) == 1
        with pytest.raises(ZeroDivisionError):
            next(ahead)
    assert closed == [True]
    assert ahead.busy > 0.0


def test_a_stop_is_seen_while_waiting_for_an_item() -> None:
    go, asked = threading.Event(), threading.Event()

    def items():
        asked.set()
        go.wait(30)
        yield 1

    def check() -> None:
        if asked.is_set():
            raise InterruptedError

    with pytest.raises(InterruptedError), Prefetch(items(), 1, check) as ahead:
        next(ahead)
    go.set()  # nobody waited for the thread


def test_background_work_is_done_in_order_and_at_most_one_item_waits() -> None:
    done: list[int] = []
    running, go = threading.Event(), threading.Event()

    def work(i: int) -> None:
        running.set()
        go.wait(30)
        done.append(i)

    checks: list[int] = []

    def check() -> None:
        checks.append(len(done))
        if len(checks) > 3 and not go.is_set():
            assert len(background._pending) == 2  # the third item is not taken while one waits
            go.set()

    with Background(work, check) as background:
        for i in range(5):
            background.submit(i)
    assert done == [0, 1, 2, 3, 4]


def test_nothing_is_worked_on_after_an_error_of_the_background() -> None:
    done: list[int] = []
    go = threading.Event()

    def work(i: int) -> None:
        go.wait(30)
        done.append(i)
        raise ZeroDivisionError

    background = Background(work, lambda: None)
    with pytest.raises(ZeroDivisionError), background:  # noqa: PT012
        background.submit(0)
        background.submit(1)
        go.set()
        background.submit(2)
    assert done == [0]


def test_an_error_outside_finishes_the_item_in_work_and_drops_the_other() -> None:
    done: list[int] = []
    begun = threading.Event()

    def work(i: int) -> None:
        begun.set()
        while not background._stopped:
            time.sleep(0.001)
        done.append(i)

    with pytest.raises(KeyError), Background(work, lambda: None) as background:  # noqa: PT012
        background.submit(0)
        background.submit(1)
        assert begun.wait(30)
        raise KeyError
    assert done == [0]


def test_a_long_wait_is_said_to_the_innermost_listener_and_a_short_one_is_not(monkeypatch) -> None:
    outer: list[str] = []
    inner: list[str] = []
    said = threading.Event()
    with shown(outer.append), waiting("a moment"):
        pass
    monkeypatch.setattr(threads, "FIRST_SECONDS", 0.001)
    with shown(outer.append), shown(lambda line: (inner.append(line), said.set())), waiting("reading weights"):
        assert said.wait(30)
    assert (outer, inner) == ([], ["reading weights ..."])
    with waiting("reading weights") as progress:  # nobody listens
        progress(0.5)
    assert not any(thread.name == threads.THREADS + "waiting" for thread in threading.enumerate())
