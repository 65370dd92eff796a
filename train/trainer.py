"""One run inside a process: its state and everything around its steps, up to the result. A sweep has many."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from sae_granary import sae_core
from sae_granary.cache.load.loader import Batch, LoaderState
from sae_granary.cache.load.whole_contexts import Contexts
from sae_granary.common import run_files as files
from sae_granary.common.signals import StopRequest
from sae_granary.sae_core import SAE, Rows
from sae_granary.train import loop, validate
from sae_granary.train.callbacks import Callbacks, StepEvent
from sae_granary.train.config.merge import to_sections, to_yaml
from sae_granary.train.data.run_data import RunData, export_metadata
from sae_granary.train.data.streams import state_after, step_input
from sae_granary.train.errors import DivergedError, InterruptedRunError
from sae_granary.train.folders import CONFIG, RECORD, RECORD_VERSION, SUMMARY, read_run
from sae_granary.train.follow import Follower
from sae_granary.train.result.evaluate import evaluate, evaluate_downstream
from sae_granary.train.sinks.metrics_line import last_training_l0, summarize
from sae_granary.train.sinks.sink import Sinks
from sae_granary.train.state import checkpoint
from sae_granary.train.state.clock import Clock
from sae_granary.train.state.initial import start_from
from sae_granary.train.state.rng import Rng
from sae_granary.train.state.run_state import Run, build_sae
from sae_granary.train.step_input import RowInput

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """A trained SAE in evaluation mode, its folder, and the final numbers."""

    sae: SAE
    folder: Path
    summary: Mapping[str, Any]


class Trainer:
    """A run, its data, folder and sinks: takes batches, writes metrics and checkpoints, and ends with a result."""

    def __init__(
        self,
        data: RunData,
        run: Run,
        folder: Path,
        sinks: Sinks,
        state: LoaderState,
        seconds: float = 0.0,
        callbacks: Callbacks | None = None,
    ) -> None:
        self.data, self.run, self.folder, self.sinks = data, run, folder, sinks
        self.state = state  # of the stream, behind the last batch taken
        self.clock = Clock(seconds, run.tokens)
        self.callbacks = Callbacks() if callbacks is None else callbacks
        self._follower = Follower(data, run, sinks, self.clock, self.callbacks)
        self._saved_step = run.step
        self._saved_at = time.monotonic()

    @property
    def step(self) -> int:
        """Batches taken so far."""
        return self.run.step

    @property
    def done(self) -> bool:
        """Whether every step was taken."""
        return self.run.done

    def begin(self) -> None:
        """Tell the sinks."""
        config = self.data.config
        self.sinks.start(self.folder.name, to_sections(config), self.run.n_steps, self.run.step)
        if self.data.eval_part != "heldout":
            self.sinks.message("no document is held out: the final evaluation uses training rows")

    def take(self, batch: Batch | Contexts, waited: float) -> None:
        """Take one step, log it, save a checkpoint when one is due. Raises DivergedError."""
        run = self.run
        self.clock.add(waited)
        with self.clock, run.rng:
            x = step_input(self.data, batch)
            result = loop.train_step(run, x, measure=loop.measures(run))
        self.state = state_after(self.data, batch)
        run.optimizer.zero_grad(set_to_none=True)  # gradients of one member at a time
        rows = x.rows if isinstance(x, RowInput) else None
        event = StepEvent(self.folder.name, self.folder, run.step, run.n_steps, run.tokens, run.sae, rows, result)
        self._follower.step(event, self.state)
        if self._save_is_due() or self.callbacks.want_checkpoint(event):
            self.save()
        loop.check_progress(run)

    def _save_is_due(self) -> bool:
        config = self.data.config
        by_step = config.save_every > 0 and self.step % config.save_every == 0
        minutes = (time.monotonic() - self._saved_at) / 60
        best = config.keep_best and validate.is_due(self.run) and self.run.patience.since == 0
        return self.done or by_step or best or (config.save_minutes > 0 and minutes >= config.save_minutes)

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        if self.step == self._saved_step:
            return
        self.sinks.flush()
        extra = {"callbacks": self.callbacks.state()}
        path = checkpoint.save(
            self.folder, self.run, self.state, self.data.identity, seconds=self.clock.seconds, extra=extra
        )
        self.callbacks.on_checkpoint(path, self.step)
        self._saved_step, self._saved_at = self.step, time.monotonic()

    def finish(self, stop: StopRequest) -> Result:
        """Calibrate, evaluate, write the result. Raises DivergedError, and InterruptedRunError when asked to stop."""
        run, data = self.run, self.data
        with run.rng:
            if run.ema is not None:
                run.ema.copy_to(run.sae)
            run.sae.calibrate(self._until(stop, data.calibration()))
            numbers: dict[str, float | None] = {}
            numbers |= evaluate(run.sae, self._until(stop, data.evaluation()), run.config.dead_threshold)
            if data.config.eval_downstream and data.language_model is not None:
                numbers |= evaluate_downstream(
                    run.sae, data.language_model, self._until(stop, data.evaluation_windows())
                )
        self._check_numbers(numbers)
        self.sinks.flush()
        summary = summarize(run, data, numbers, last_training_l0(self.folder), self.clock.seconds)
        if data.config.keep_best and (best := checkpoint.best_checkpoint(self.folder)):
            summary["best_checkpoint"] = best.name
        for path in sae_core.save(run.sae, self.folder, export_metadata(data, self.folder)):
            files.sync_file(path)
        self.sinks.finish(summary)
        self.sinks.flush()
        files.write_json(self.folder / SUMMARY, summary)
        self.callbacks.on_end(summary)
        return Result(run.sae.eval(), self.folder, summary)

    def _check_numbers(self, numbers: Mapping[str, float | None]) -> None:
        """Raises DivergedError for an SAE whose evaluation is no number."""
        if not all(value is None or math.isfinite(value) for value in numbers.values()):
            raise DivergedError(
                f"the SAE gives NaN or Inf after {self.step} steps ({self.run.rejected} batches rejected): "
                f"{self.folder} has no result; train again with a lower --lr"
            )

    def _until(self, stop: StopRequest, items: Iterable[T]) -> Iterator[T]:
        for item in items:
            InterruptedRunError.raise_if(stop, self.step, self.folder)
            yield item


def open_trainer(
    data: RunData,
    folder: Path,
    make_sinks: Callable[[str], Sinks],
    sample: Callable[[RunData], Rows] = RunData.sample,
    callbacks: Callbacks | None = None,
) -> Trainer:
    """The run of a folder that is held (`folders.exclusive`): from its newest checkpoint, or at its start.

    A run that never started is recorded first: from then on it can be resumed. `make_sinks` gets the id for wandb.
    Raises CheckpointError (damaged, or another cache).
    """
    record = _record(data, folder)
    files.remove_temporary(folder / checkpoint.FOLDER)
    sinks = make_sinks(str(record["wandb_id"]))
    found = checkpoint.list_checkpoints(folder)
    if found:
        restored = checkpoint.load(found[-1], data.config, data.identity)
        if callbacks is not None:
            callbacks.restore(restored.extra.get("callbacks", []))
        return Trainer(data, restored.run, folder, sinks, restored.loader_state, restored.seconds, callbacks)
    state = LoaderState(data.order.seed)
    return Trainer(data, _fresh_run(data, sample), folder, sinks, state, callbacks=callbacks)


def _record(data: RunData, folder: Path) -> Mapping[str, Any]:
    """run.json of the folder, written unless it is there."""
    identity = asdict(data.identity)
    if (folder / RECORD).is_file():
        record = read_run(folder)[1]
        checkpoint.check_identity({"cache": record["cache"], "order": record["order"]}, identity, folder / RECORD)
        return record
    record = {"version": RECORD_VERSION, "counts": data.counts.to_json(), **identity, "wandb_id": secrets.token_hex(8)}
    files.write_text(folder / CONFIG, to_yaml(data.config))
    files.write_json(folder / RECORD, record)
    return record


def _fresh_run(data: RunData, sample: Callable[[RunData], Rows]) -> Run:
    """Build and initialise the SAE from a sample of training rows."""
    assert data.config.init_seed is not None
    seed = data.config.init_seed
    with Rng.seeded(seed) as rng:
        sae = build_sae(data.config)
        sae.initialize(sample(data), torch.Generator().manual_seed(seed))
        if data.config.init_from is not None:
            start_from(sae, data.config.init_from)
        run = Run.create(data.config, sae)
    run.rng = rng
    return run
