"""One run inside a process: its state, and everything around its steps, up to the result. A sweep has several."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from sae_granary.cache.load.loader import Batch, LoaderState
from sae_granary.cache.load.whole_contexts import Contexts
from sae_granary.common.finished_run import SUMMARY
from sae_granary.common.signals import StopRequest
from sae_granary.common.signed import write_signed
from sae_granary.common.threads import waiting
from sae_granary.sae_core import SAE, Rows
from sae_granary.sae_core.data import Repeatable
from sae_granary.sae_core.errors import NonFiniteError
from sae_granary.train import loop
from sae_granary.train.callbacks import Callbacks, StepEvent
from sae_granary.train.config.merge import to_sections
from sae_granary.train.data import passes
from sae_granary.train.data.language import evaluation_contexts
from sae_granary.train.data.run_data import RunData
from sae_granary.train.data.streams import state_after, state_to_resample, step_input
from sae_granary.train.errors import DivergedError, InterruptedRunError
from sae_granary.train.memory.shrink import shrink
from sae_granary.train.optim import resample
from sae_granary.train.result.evaluate import evaluate, evaluate_downstream, validate
from sae_granary.train.result.own_files import save_and_check
from sae_granary.train.result.summary import export_metadata, summarize
from sae_granary.train.sinks.metrics_line import Line, Lines, histograms_of
from sae_granary.train.sinks.sink import Sinks
from sae_granary.train.state import checkpoint
from sae_granary.train.state.clock import Clock
from sae_granary.train.state.run_state import Run
from sae_granary.train.step_input import RowInput, StepInput

T = TypeVar("T")
MAX_NAMED = 10  # rejected batches of a run that are named on the console


@dataclass(frozen=True)
class Result:
    """A trained SAE in evaluation mode, its folder, and the final numbers."""

    sae: SAE
    folder: Path
    summary: Mapping[str, Any]


class Trainer:
    """A run with its data, folder and sinks: takes batches, writes metrics and checkpoints, returns a result."""

    def __init__(
        self,
        data: RunData,
        run: Run,
        folder: Path,
        sinks: Sinks,
        state: LoaderState,
        seconds: float,
        callbacks: Callbacks,
    ) -> None:
        self.data, self.run, self.folder, self.sinks = data, run, folder, sinks
        self.state = state  # of the stream, behind the last batch taken
        self.clock = Clock(seconds, run.tokens)
        self.callbacks = callbacks
        self._lines = Lines(run, sinks)
        self._saved_step = run.step
        self._saved_at = time.monotonic()

    @property
    def step(self) -> int:
        """Batches taken so far."""
        return self.run.step

    @property
    def done(self) -> bool:
        """Whether every step was taken, or `early_stop` ended the run."""
        return self.run.done

    def begin(self) -> None:
        """Tell the sinks that the run starts or continues."""
        config = self.data.config
        self.sinks.start(self.folder.name, to_sections(config), self.run.n_steps, self.run.step)
        if self.data.eval_part != "heldout":
            self.sinks.message("no document is held out: the final evaluation uses training rows")

    # -- a step ------------------------------------------------------------------------------------------------

    def take(self, batch: Batch | Contexts, waited: float) -> None:
        """Take one step, log it, save a checkpoint if one is due. Raises DivergedError.

        `waited` is this run's share of the seconds spent waiting for the batch.
        """
        run = self.run
        self.clock.wait(waited)
        with self.clock, run.rng:
            x = step_input(self.data, batch)
            result = self._step(x)
        self._lines.write()
        self.state = state_after(self.data, batch)
        run.optimizer.zero_grad(set_to_none=True)  # one run of a process at a time has gradients
        rows = x.rows if isinstance(x, RowInput) else None
        event = StepEvent(self.folder.name, self.folder, run.step, run.n_steps, run.tokens, run.sae, rows, result)
        if not result.accepted and run.rejected <= MAX_NAMED:
            at = f"epoch {self.state.epoch}, cursor {self.state.cursor}"
            self.sinks.message(f"the batch of step {run.step} ({at}) is rejected: {result.problem}")
        self._log(event)
        if run.sae.shards.any(self._save_is_due() or self.callbacks.want_checkpoint(event)):
            self.save()
        if run.rejected_in_row:
            self._lines.write()
        loop.check_progress(run)

    def _step(self, x: StepInput) -> loop.StepResult:
        """Take a step, in smaller micro-batches if it does not fit the memory; then all later steps have them."""
        while True:
            try:
                return loop.train_step(self.run, x, measure=loop.measures(self.run))
            except loop.StepTooLargeError:
                pass  # shrink outside of this block, where nothing holds the memory of the failed step any more
            self.sinks.message(shrink(self.run))
            self.data = self.data.with_config(self.run.config)

    def _log(self, event: StepEvent) -> None:
        """Validate, resample, log and write histograms after a step."""
        run, result = self.run, event.result
        if (measured := result.measured) is not None:
            run.density.update(measured.fired, measured.n_rows)
        numbers = {**self._resample(), **self._validate(), **self._densities(), **self.callbacks.on_step(event)}
        if run.sae.shards.any(measured is not None or not result.accepted or bool(numbers)):
            self._lines.put(Line(run, self.state, result, self.clock, numbers))

    def _resample(self) -> dict[str, float]:
        run = self.run
        if not resample.is_due(run.config, run.step, run.n_steps):
            return {}
        with self.clock, run.rng:
            state = state_to_resample(self.data, run.step, self.state)
            rows = passes.upcoming(self.data, state, run.config.resample_rows)
            return {"resampled": resample.resample_dead(run, rows)}

    def _validate(self) -> dict[str, float]:
        return validate(self.run, self.validation_rows) if self.run.is_at(self.run.config.eval_every) else {}

    @cached_property
    def validation_rows(self) -> list[Rows]:
        """Validation rows, kept in memory: every validation uses the same rows."""
        return list(passes.validation(self.data))

    def _densities(self) -> dict[str, float]:
        run = self.run
        if not run.density.n_rows or not (run.done or run.is_at(run.config.density_every)):
            return {}
        numbers = run.density.numbers(run.config.dead_threshold, run.sae.shards)
        self.sinks.histograms(run.step, histograms_of(run))
        run.density.clear()
        return numbers

    # -- checkpoints -------------------------------------------------------------------------------------------

    def _save_is_due(self) -> bool:
        run, config = self.run, self.data.config
        minutes = (time.monotonic() - self._saved_at) / 60
        by_time = config.save_minutes > 0 and minutes >= config.save_minutes
        best = config.keep_best and run.is_at(config.eval_every) and run.patience.since == 0
        return self.done or run.is_at(config.save_every) or best or by_time

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        self._lines.write()
        if self.step == self._saved_step:
            return
        self.sinks.flush()
        extra = {"callbacks": self.callbacks.state()}
        with self._diverges():
            path = checkpoint.save(
                self.folder, self.run, self.state, self.data.identity, seconds=self.clock.seconds, extra=extra
            )
        self.callbacks.on_checkpoint(path, self.step)
        self._saved_step, self._saved_at = self.step, time.monotonic()

    # -- the end -----------------------------------------------------------------------------------------------

    def finish(self, stop: StopRequest) -> Result:
        """Calibrate, evaluate, write the SAE and the summary.

        Raises DivergedError, FilesDifferError if the files give another SAE, and InterruptedRunError if asked to stop.
        """
        run, data = self.run, self.data
        self._lines.write()
        with run.rng:
            if run.ema is not None:
                run.ema.copy_to(run.sae)
            with waiting("calibrating the inference threshold"):
                run.sae.calibrate(Repeatable(lambda: self._until(stop, passes.calibration(data))))
            with waiting("evaluating"):
                numbers, rows = self._evaluate(stop)
        self.sinks.flush()
        summary = summarize(run, data, self.folder, numbers, self.clock)
        with self._diverges(), waiting("writing the SAE and reading it again"):
            save_and_check(run.sae, self.folder, export_metadata(data, self.folder), rows)
        self.sinks.finish(summary)
        self.sinks.flush()
        if run.sae.shards.index == 0:
            write_signed(self.folder / SUMMARY, summary, allow_nan=True)
        self.callbacks.on_end(summary)
        return Result(run.sae.eval(), self.folder, summary)

    def _evaluate(self, stop: StopRequest) -> tuple[dict[str, float | None], Rows]:
        """The final metrics, and the first batch of the evaluated rows. Raises DivergedError for NaN or Inf."""
        run, data = self.run, self.data
        dropped: list[int] = []
        batches = self._until(stop, passes.evaluation(data, dropped.append))
        first = next(batches, None)
        evaluated = () if first is None else chain([first], batches)
        numbers = evaluate(run.sae, evaluated, run.config.dead_threshold) | {"n_dropped": sum(dropped)}
        if data.config.eval_downstream and data.language_model is not None:
            numbers |= evaluate_downstream(run.sae, data.language_model, self._until(stop, evaluation_contexts(data)))
        if not all(value is None or math.isfinite(value) for value in numbers.values()):
            raise self._diverged("the SAE gives NaN or Inf")
        return numbers, next(passes.calibration(data)) if first is None else first

    def _diverged(self, what: str) -> DivergedError:
        rejected = f"{self.run.rejected} batches rejected"
        return DivergedError(
            f"{what} after {self.step} steps ({rejected}): {self.folder} has no result; check the cache with "
            "`sae-cache verify`, then train again with a lower --lr"
        )

    @contextmanager
    def _diverges(self) -> Iterator[None]:
        try:
            yield
        except NonFiniteError as error:
            raise self._diverged(str(error)) from None

    def _until(self, stop: StopRequest, items: Iterable[T]) -> Iterator[T]:
        for item in items:
            InterruptedRunError.raise_if(stop, self.step, self.folder)
            yield item
