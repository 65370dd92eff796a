"""Where the numbers of a run go: jsonl always, a console, wandb when asked. A sink never stops a run.

Metric names of a line: step, tokens, epoch, cursor, loss, losses/<name>, l0, fvu, explained_variance, mse,
details/<name>, dead, n_dead, mean_passes_since_fired, grad_norm, grad_norm/<parameter>, lr, rejected, seconds,
tokens_per_second; now and then mean_log10_density, below_dead_threshold, never_fired, val/<name>, resampled, and what
callbacks return. `TIMING` names those that differ between equal runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from sae_granary.common import run_files as files

METRICS_FILE = "metrics.jsonl"
TIMING = ("seconds", "tokens_per_second")

Metrics = Mapping[str, float | int]
Histograms = Mapping[str, Tensor]  # one-dimensional values by name


class Sink(Protocol):
    """Receives a run as it happens; every method is optional to care about."""

    def start(self, name: str, config: Mapping[str, Any], n_steps: int, step: int) -> None:
        """The run starts, or continues behind `step`."""

    def metrics(self, metrics: Metrics) -> None:
        """One line of metrics."""

    def histograms(self, step: int, values: Histograms) -> None:
        """What is worth a histogram, every `density_every` steps."""

    def message(self, text: str) -> None:
        """Something a person should know."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run is complete."""

    def flush(self) -> None:
        """A checkpoint follows: put everything on the disk."""

    def close(self) -> None:
        """Release what is held, also after an error."""


class BaseSink:
    """A sink that ignores everything: override what matters."""

    def start(self, name: str, config: Mapping[str, Any], n_steps: int, step: int) -> None:
        """See `Sink`."""

    def metrics(self, metrics: Metrics) -> None:
        """See `Sink`."""

    def histograms(self, step: int, values: Histograms) -> None:
        """See `Sink`."""

    def message(self, text: str) -> None:
        """See `Sink`."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """See `Sink`."""

    def flush(self) -> None:
        """See `Sink`."""

    def close(self) -> None:
        """See `Sink`."""


class JsonlSink(BaseSink):
    """metrics.jsonl in the run's folder; a resume cuts it back to the checkpoint's step."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_FILE

    def start(self, name: str, config: Mapping[str, Any], n_steps: int, step: int) -> None:
        """Keep the lines up to the step that the run continues behind."""
        kept = [line for line in read_lines(self.path) if json.loads(line)["step"] <= step]
        files.write_text(self.path, "".join(f"{line}\n" for line in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)

    def metrics(self, metrics: Metrics) -> None:
        """Append a line."""
        self._file.write(json.dumps(dict(metrics)) + "\n")
        self._file.flush()

    def flush(self) -> None:
        """To the disk, so that no checkpoint is ahead of its metrics."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if hasattr(self, "_file"):
            self._file.close()


class Sinks(BaseSink):
    """Several sinks as one. A sink that fails is dropped with a message; jsonl is written first."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)

    def start(self, name: str, config: Mapping[str, Any], n_steps: int, step: int) -> None:
        """See `Sink`."""
        self._each("start", name, config, n_steps, step)

    def metrics(self, metrics: Metrics) -> None:
        """See `Sink`."""
        self._each("metrics", metrics)

    def histograms(self, step: int, values: Histograms) -> None:
        """See `Sink`."""
        self._each("histograms", step, values)

    def message(self, text: str) -> None:
        """See `Sink`."""
        self._each("message", text)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """See `Sink`."""
        self._each("finish", summary)

    def flush(self) -> None:
        """See `Sink`."""
        self._each("flush")

    def close(self) -> None:
        """See `Sink`."""
        self._each("close")

    def _each(self, method: str, *args: Any) -> None:
        for sink in list(self._sinks):
            try:
                getattr(sink, method)(*args)
            except Exception as error:
                if isinstance(sink, JsonlSink):  # a run without its metrics is not worth continuing: the disk is full
                    raise
                self._sinks.remove(sink)
                self.message(f"{type(sink).__name__} failed and is left out from here on: {error!r}")


def read_lines(path: Path) -> list[str]:
    """Lines of a metrics file that hold a step; one that a kill cut off or that is damaged is dropped."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    return [line for line in lines if _holds_a_step(line)]


def _holds_a_step(line: str) -> bool:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and isinstance(content.get("step"), int)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run as dictionaries."""
    return [json.loads(line) for line in read_lines(folder / METRICS_FILE)]
