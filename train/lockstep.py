"""Several runs in lockstep: every batch of one stream goes to all of them. A single run is a group of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from typing import TypeVar

from sae_granary.cache.errors import CacheError
from sae_granary.cache.load.loader import Batch
from sae_granary.cache.load.whole_contexts import Contexts
from sae_granary.cache.remote.store import CONTINUES
from sae_granary.common.signals import StopRequest
from sae_granary.train.data import passes
from sae_granary.train.data.streams import RunStream, state_after, state_to_resample
from sae_granary.train.errors import InterruptedRunError
from sae_granary.train.optim import resample
from sae_granary.train.state.checkpoint import list_checkpoints
from sae_granary.train.trainer import Result, Trainer

T = TypeVar("T")
OnFailure = Callable[[Trainer, Exception], None]
Prepare = Callable[[Sequence[Trainer], Batch | Contexts], None]


def train_together(
    trainers: Sequence[Trainer],
    stop: StopRequest,
    on_failure: OnFailure | None = None,
    prepare: Prepare = lambda trainers, batch: None,
) -> dict[Trainer, Result]:
    """Train all on one stream of batches (equal `RunData.stream_key`), then finish each.

    `prepare` sees each batch before it is taken. One that raises is reported to `on_failure` and left out; without it
    the exception is raised. Raises InterruptedRunError when asked to stop, after a checkpoint of each.
    """
    return _Together(trainers, stop, on_failure, prepare).execute()


class _Together:
    def __init__(
        self, trainers: Sequence[Trainer], stop: StopRequest, on_failure: OnFailure | None, prepare: Prepare
    ) -> None:
        self._left, self._stop, self._on_failure, self._prepare = list(trainers), stop, on_failure, prepare

    def execute(self) -> dict[Trainer, Result]:
        self._stop.defer()  # from here on a signal waits for a checkpoint
        for fetcher in [fetcher for trainer in self._left if (fetcher := trainer.data.cache.fetcher) is not None]:
            fetcher.stopped = lambda: bool(self._stop)
        for trainer in list(self._left):
            self._attempt(trainer, trainer.begin)
        self._stop_if_asked(self._left)
        while unfinished := [trainer for trainer in self._left if not trainer.done]:
            self._train_from(min(unfinished, key=lambda trainer: trainer.step))
        results: dict[Trainer, Result] = {}
        for trainer in list(self._left):
            InterruptedRunError.raise_if(self._stop, trainer.step, trainer.folder)
            if (result := self._attempt(trainer, partial(self._finish, trainer))) is not None:
                results[trainer] = result
        return results

    def _train_from(self, behind: Trainer) -> None:
        """One stream from the step of the trainer behind all others on; each joins at its own, until none wants more.

        Those at a later step than the last one has get another stream.
        """
        step = behind.step
        with closing(RunStream([trainer.data for trainer in self._left], behind.state, step)) as stream:
            while active := [trainer for trainer in self._left if trainer.step == step and not trainer.done]:
                before = time.perf_counter()
                try:
                    batch = next(stream)
                    for trainer in active:
                        _fetch(trainer, batch)
                except CacheError as error:
                    self._stop_if_asked(active)
                    self._save(active, error)
                    raise
                waited = (time.perf_counter() - before) / len(active)
                self._prepare(active, batch)
                for trainer in active:
                    self._attempt(trainer, partial(trainer.take, batch, waited))
                step += 1
                self._stop_if_asked([trainer for trainer in active if trainer in self._left])

    def _finish(self, trainer: Trainer) -> Result:
        try:
            return trainer.finish(self._stop)
        except CacheError as error:
            self._save([trainer], error)  # there is one of the last step: this says so
            raise

    def _stop_if_asked(self, trainers: Sequence[Trainer]) -> None:
        unfinished = [trainer for trainer in trainers if not trainer.done]
        if not self._stop or not unfinished:
            return
        for trainer in unfinished:
            self._attempt(trainer, trainer.save)
        InterruptedRunError.raise_if(self._stop, unfinished[0].step, unfinished[0].folder)

    def _save(self, active: Sequence[Trainer], error: CacheError) -> None:
        """Checkpoints where shards cannot be fetched; latents that ranks divide are saved by all of them or none."""
        saved = [t for t in active if t.data.cache.fetcher is not None and t.run.sae.shards.n == 1]
        for trainer in saved:
            self._attempt(trainer, trainer.save)
        if saved:
            folder = saved[0].folder if self._on_failure is None else saved[0].folder.parent  # that of a sweep
            told = f"{str(error).removesuffix(CONTINUES)}; step {saved[0].step} is saved"
            error.args = (f"{told}: `sae-train resume {folder}` continues",)

    def _attempt(self, trainer: Trainer, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except InterruptedRunError:
            raise
        except Exception as error:
            if isinstance(error, CacheError):  # shards were being fetched, in the middle of a step
                saved = [int(path.name.removeprefix("step_")) for path in list_checkpoints(trainer.folder)]
                InterruptedRunError.raise_if(self._stop, max(saved, default=0), trainer.folder)
            if self._on_failure is None:
                raise
            self._left.remove(trainer)
            self._on_failure(trainer, error)
            return None


def _fetch(trainer: Trainer, batch: Batch | Contexts) -> None:
    """Fetch what the next step reads besides its batch: where that fails, the step before can still be saved."""
    data, config, step = trainer.data, trainer.run.config, trainer.step + 1
    if data.cache.fetcher is None or data.share.index:  # of ranks that share batches the first one reads
        return
    if config.eval_every and step % config.eval_every == 0:
        trainer.validation_rows  # noqa: B018 - kept from here on
    if resample.is_due(config, step, trainer.run.n_steps):
        for _ in passes.upcoming(data, state_to_resample(data, step, state_after(data, batch)), config.resample_rows):
            pass
