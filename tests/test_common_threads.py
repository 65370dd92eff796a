"""Items and calls made ahead by threads, and work left to one."""

import threading
import time
import weakref

import pytest

from sae_granary.common.threads import Background, Prefetch, Workers


@pytest.fixture
def workers():
    made: list[Workers] = []

    def make(n_threads: int) -> Workers:
        made.append(Workers(n_threads))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("n_threads", [0, 1, 3])
def test_each_call_is_made_once_and_gives_its_own_result(workers, n_threads) -> None:
    made: list[int] = []

    def call(i: int) -> int:
        made.append(i)
        return i * i

    pool = workers(n_threads)
    results = [pool.submit(lambda i=i: call(i)) for i in range(50)]
    assert [result() for result in results] == [i * i for i in range(50)]
    assert sorted(made) == list(range(50))


def test_who_waits_makes_the_next_call(workers) -> None:
    second_made = threading.Event()
    pool = workers(1)
    first = pool.submit(lambda: second_made.wait(30))  # ends only when another thread makes the second call
    pool.submit(second_made.set)
    assert first() is True


def test_an_error_belongs_to_its_call_whoever_made_it(workers) -> None:
    pool = workers(0)
    bad, good = pool.submit(lambda: 1 // 0), pool.submit(lambda: 7)
    assert good() == 7  # made after the bad call, by this thread
    with pytest.raises(ZeroDivisionError):
        bad()


def test_an_interrupt_reaches_the_thread_that_it_meets_and_who_waits_for_that_call(workers) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    pool = workers(0)
    bad, good = pool.submit(interrupted), pool.submit(lambda: 7)
    with pytest.raises(KeyboardInterrupt):  # while it helps
        good()
    assert good() == 7
    with pytest.raises(KeyboardInterrupt):  # instead of waiting forever
        bad()


def test_no_thread_keeps_a_result_that_was_taken(workers) -> None:
    class Rows:
        pass

    pool, made = workers(1), threading.Event()

    def make() -> Rows:
        made.set()
        return Rows()

    result = pool.submit(make)
    assert made.wait(30)  # by the thread, which now waits for another call
    kept = weakref.ref(result())
    del result
    deadline = time.monotonic() + 30
    while kept() is not None and time.monotonic() < deadline:
        time.sleep(0.01)  # it lets go a moment after the result is there
    assert kept() is None


def test_closing_drops_what_has_not_begun(workers) -> None:
    begun, go, made = threading.Event(), threading.Event(), []
    pool = workers(1)

    def first() -> None:
        begun.set()
        go.wait(30)
        made.append("first")

    pool.submit(first)
    for _ in range(5):
        pool.submit(lambda: made.append("later"))
    assert begun.wait(30)
    closing = threading.Thread(target=pool.close)
    closing.start()
    while pool._calls.qsize() != 1:  # five calls are left, then none, then the end of the thread
        time.sleep(0.001)
    go.set()
    closing.join(30)
    assert made == ["first"]
    assert not any(thread.is_alive() for thread in pool._threads)


def test_items_are_made_ahead_and_no_further(workers) -> None:
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
    begun, go = threading.Event(), threading.Event()

    def work(i: int) -> None:
        begun.set()
        go.wait(30)
        done.append(i)

    with pytest.raises(KeyError), Background(work, lambda: None) as background:  # noqa: PT012
        background.submit(0)
        background.submit(1)
        assert begun.wait(30)
        threading.Timer(0.05, go.set).start()
        raise KeyError
    assert done == [0]
