"""From the first step of this process to the result: train, calibrate, evaluate, write."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

import sae_core
from cache.loader import Batch, Loader, LoaderState
from sae_core import SAE
from train import checkpoint, files, loop
from train.config import to_sections
from train.data import Data, export_metadata
from train.errors import DivergedError, InterruptedRunError
from train.evaluate import evaluate
from train.folders import SUMMARY
from train.log import Sinks, read_metrics
from train.signals import StopRequest
from train.state import Run

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """A trained SAE in evaluation mode, its folder, and the final numbers."""

    sae: SAE
    folder: Path
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class Session:
    """What a run needs besides its own state: data, batches, a folder, sinks, and when to stop."""

    data: Data
    loader: Loader
    folder: Path
    sinks: Sinks
    stop: StopRequest

    @property
    def identity(self) -> checkpoint.Identity:
        """What checkpoints belong to."""
        return self.data.identity(self.loader)

    def execute(self, run: Run, seconds: float = 0.0) -> Result:
        """Train to the end, calibrate, evaluate, write the result."""
        config = self.data.config
        self.sinks.start(self.folder.name, to_sections(config), run.n_steps, run.step)
        clock = Clock(seconds, run.tokens)
        last: dict[str, Any] = {}

        def on_step(run: Run, batch: Batch, result: loop.StepResult) -> None:
            if result.metrics or not result.accepted:
                line = metrics_of(run, batch, result, clock)
                last.update(line)
                self.sinks.metrics(line)
            due = config.save_every > 0 and run.step % config.save_every == 0
            if due or self.stop or run.done:
                self._save(run, batch.state, clock)
            if self.stop and not run.done:
                raise self.interrupted(run)

        if not run.done:
            loop.train(run, self.loader, measure_every=config.log_every, on_step=on_step)
            self.loader.close()
        seconds = clock.seconds
        run.sae.calibrate(self._until_stopped(self.data.calibration(), run))
        numbers = evaluate(run.sae, self._until_stopped(self.data.evaluation(), run))
        self._check_numbers(run, numbers)
        summary = summarize(run, self.data, numbers, _last_training_l0(self.folder, last), seconds)
        return self._finish(run, summary)

    def _save(self, run: Run, state: LoaderState, clock: Clock) -> None:
        self.sinks.flush()
        checkpoint.save(self.folder, run, state, self.identity, seconds=clock.seconds)

    def _check_numbers(self, run: Run, numbers: Mapping[str, float]) -> None:
        """Raises DivergedError for an SAE whose evaluation is no number."""
        if not all(math.isfinite(value) for value in numbers.values()):
            raise DivergedError(
                f"the SAE gives NaN or Inf after {run.step} steps ({run.rejected} batches rejected): {self.folder} has "
                "no result; train again with a lower --lr"
            )

    def _finish(self, run: Run, summary: Mapping[str, Any]) -> Result:
        for path in sae_core.save(run.sae, self.folder, export_metadata(self.data, self.folder)):
            files.sync_file(path)
        self.sinks.finish(summary)
        self.sinks.flush()
        files.write_json(self.folder / SUMMARY, summary)
        return Result(run.sae.eval(), self.folder, summary)

    def _until_stopped(self, items: Iterable[T], run: Run) -> Iterator[T]:
        for item in items:
            if self.stop:
                raise self.interrupted(run)
            yield item

    def interrupted(self, run: Run) -> InterruptedRunError:
        """What to raise when a stop was asked for."""
        assert self.stop.signum is not None
        return InterruptedRunError(self.stop.signum, run.step, self.folder)


class Clock:
    """Training time over interruptions, and the rate since the process started."""

    def __init__(self, seconds: float, tokens: int) -> None:
        self._before, self._tokens, self._start = seconds, tokens, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training, earlier processes included."""
        return self._before + time.perf_counter() - self._start

    def rate(self, tokens: int) -> float:
        """Rows per second in this process."""
        return (tokens - self._tokens) / max(time.perf_counter() - self._start, 1e-9)


def metrics_of(run: Run, batch: Batch, result: loop.StepResult, clock: Clock) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    dead = int(run.sae.dead_mask.sum())
    wanted = {name: result.metrics[name] for name in ("l0", "fvu", "explained_variance") if name in result.metrics}
    numbers = {
        "step": run.step,
        "tokens": run.tokens,
        "epoch": batch.state.epoch,
        "cursor": batch.state.cursor,
        "loss": result.loss,
        **{f"losses/{name}": value for name, value in result.losses.items()},
        **wanted,
        **{f"details/{name}": value for name, value in result.details.items()},
        "dead": dead / run.sae.config.d_sae,
        "n_dead": dead,
        "grad_norm": result.grad_norm,
        "lr": run.optimizer.param_groups[0]["lr"],
        "rejected": run.rejected,
        "seconds": round(clock.seconds, 3),
        "tokens_per_second": round(clock.rate(run.tokens), 1),
    }
    return {name: value for name, value in numbers.items() if value == value}  # a rejected batch: JSON has no NaN


def summarize(
    run: Run, data: Data, numbers: Mapping[str, float], l0_train: float | None, seconds: float
) -> dict[str, Any]:
    """summary.json: what was trained, and how good it is."""
    config = data.config
    return {
        "name": config.name,
        "type": config.type,
        "cache": config.cache,
        "hook": list(config.hook),
        "d_in": config.options["d_in"],
        "d_sae": config.options["d_sae"],
        "k": config.options.get("k"),
        "steps": run.step,
        "tokens": run.tokens,
        "rejected": run.rejected,
        "l0_train": l0_train,
        "dead": float(run.sae.dead_mask.float().mean()),
        "dead_after_tokens": config.options.get("dead_after_tokens"),
        "eval_part": data.eval_part,
        "eval": dict(numbers),
        "rows": data.counts.to_json(),
        "device": config.device,
        "versions": {"torch": torch.__version__},
        "seconds": round(seconds, 3),
        "tokens_per_second": round(run.tokens / max(seconds, 1e-9), 1),
    }


def _last_training_l0(folder: Path, last: Mapping[str, Any]) -> float | None:
    """L0 of the training activation on the last measured batch; from the file when no step was left to take."""
    if "l0" in last:
        return float(last["l0"])
    values = [line["l0"] for line in read_metrics(folder) if "l0" in line]
    return float(values[-1]) if values else None
