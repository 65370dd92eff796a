"""Several runs in lockstep: every batch of one stream goes to all of them. A single run is a group of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from typing import Protocol, TypeVar

from sae_granary.cache.load.loader import Batch
from sae_granary.cache.load.whole_contexts import Contexts
from sae_granary.common.signals import StopRequest
from sae_granary.train.data.streams import RunStream
from sae_granary.train.errors import InterruptedRunError
from sae_granary.train.trainer import Result, Trainer

AnyBatch = Batch | Contexts  # shuffled rows, or whole contexts for a loss through the language model
T = TypeVar("T", bound="Trainee")


class Trainee(Protocol):
    """What takes a step with every batch of a stream: a run with its logging and checkpoints."""

    @property
    def step(self) -> int:
        """Batches taken so far."""

    @property
    def done(self) -> bool:
        """Whether it needs no more batches."""

    def take(self, batch: AnyBatch, waited: float) -> None:
        """Train on a batch; `waited` is its share of the seconds spent waiting for the batch."""


class Stream(Protocol):
    """Batches from a given step on."""

    def __next__(self) -> AnyBatch:
        """The next batch."""

    def close(self) -> None:
        """Release resources."""


def feed_all(
    trainees: Iterable[T],
    open_stream: Callable[[T], Stream],
    *,
    after_batch: Callable[[Sequence[T]], None] = lambda active: None,
    on_failure: Callable[[T, Exception], None] | None = None,
) -> None:
    """Feed one stream to all until none wants more. `open_stream(t)` gives the batches from t's step on.

    Each joins at its own step: the stream starts where the one behind stands. `after_batch` sees who took the batch.
    One that raises is left out, after `on_failure`; without it the exception ends the training.
    """
    left = [t for t in trainees if not t.done]
    while left:
        first = min(left, key=lambda t: t.step)
        step = first.step
        with closing(open_stream(first)) as stream:
            while active := [t for t in left if t.step == step]:
                before = time.perf_counter()
                batch = next(stream)
                waited = (time.perf_counter() - before) / len(active)
                failed = [t for t in active if not _takes(t, batch, waited, on_failure)]
                step += 1
                left = [t for t in left if t not in failed and not t.done]
                after_batch([t for t in active if t not in failed])


def _takes(trainee: T, batch: AnyBatch, waited: float, on_failure: Callable[[T, Exception], None] | None) -> bool:
    try:
        trainee.take(batch, waited)
    except Exception as error:
        if on_failure is None:
            raise
        on_failure(trainee, error)
        return False
    return True


OnFailure = Callable[[Trainer, Exception], None]


def train_together(
    trainers: Sequence[Trainer], stop: StopRequest, on_failure: OnFailure | None = None
) -> dict[Trainer, Result]:
    """Train all on one stream of batches (equal `RunData.stream_key`), then finish each.

    One that raises is reported to `on_failure` and left out; without it the exception is raised.
    Raises InterruptedRunError when asked to stop, after a checkpoint of each.
    """
    return _Together(trainers, stop, on_failure).execute()


class _Together:
    def __init__(self, trainers: Sequence[Trainer], stop: StopRequest, on_failure: OnFailure | None) -> None:
        self._all, self._stop, self._on_failure = trainers, stop, on_failure
        self._failed: list[Trainer] = []

    def execute(self) -> dict[Trainer, Result]:
        self._stop.defer()  # from here on a signal waits for a checkpoint
        for trainer in self._all:
            self._attempt(trainer, trainer.begin)
        left = self._left()
        if unfinished := [t for t in left if not t.done]:
            InterruptedRunError.raise_if(self._stop, unfinished[0].step, unfinished[0].folder)
        on_failure = None if self._on_failure is None else self._fail
        feed_all(left, self._stream_from, after_batch=self._stop_if_asked, on_failure=on_failure)
        results: dict[Trainer, Result] = {}
        for trainer in self._left():
            InterruptedRunError.raise_if(self._stop, trainer.step, trainer.folder)
            self._attempt(trainer, partial(self._finish, trainer, results))
        return results

    def _finish(self, trainer: Trainer, results: dict[Trainer, Result]) -> None:
        results[trainer] = trainer.finish(self._stop)

    def _left(self) -> list[Trainer]:
        return [trainer for trainer in self._all if trainer not in self._failed]

    def _stream_from(self, trainer: Trainer) -> RunStream:
        return RunStream([t.data for t in self._left()], trainer.state, trainer.step)

    def _stop_if_asked(self, active: Sequence[Trainer]) -> None:
        unfinished = [trainer for trainer in active if not trainer.done]
        if not self._stop or not unfinished:
            return
        for trainer in unfinished:
            self._attempt(trainer, trainer.save)
        InterruptedRunError.raise_if(self._stop, unfinished[0].step, unfinished[0].folder)

    def _attempt(self, trainer: Trainer, action: Callable[[], None]) -> None:
        try:
            action()
        except InterruptedRunError:
            raise
        except Exception as error:
            if self._on_failure is None:
                raise
            self._fail(trainer, error)

    def _fail(self, trainer: Trainer, error: Exception) -> None:
        assert self._on_failure is not None
        self._failed.append(trainer)
        self._on_failure(trainer, error)
