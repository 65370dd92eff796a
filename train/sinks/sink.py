"""Where the numbers of a run go. A sink that fails is left out and never stops a run, unless it is essential.

Metric names of a line: step, tokens, epoch, cursor, loss, losses/<name>, l0, fvu, explained_variance, mse,
details/<name>, dead, n_dead, mean_passes_since_fired, grad_norm, grad_norm/<parameter>, lr, rejected, seconds,
tokens_per_second; now and then mean_log10_density, density/rare, density/never_fired, val/<name>, resampled, and what
callbacks return. What they mean: `train.result.notes`. `TIMING` names those that differ between equal runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

TIMING = ("seconds", "tokens_per_second")

Metrics = Mapping[str, float | int]
Histograms = Mapping[str, Tensor]  # one-dimensional values by name


class BaseSink:
    """Receives the events of a run and ignores them: override the methods you need."""

    essential: ClassVar[bool] = False  # whether a run ends when this sink fails

    def start(self, name: str, config: Mapping[str, Any], n_steps: int, step: int) -> None:
        """The run starts, or continues after `step`."""

    def metrics(self, metrics: Metrics) -> None:
        """One line of metrics."""

    def histograms(self, step: int, values: Histograms) -> None:
        """Histograms, every `density_every` steps."""

    def message(self, text: str) -> None:
        """A message for the user."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run is complete."""

    def flush(self) -> None:
        """A checkpoint follows: write everything to the disk."""

    def close(self) -> None:
        """Release resources, also after an error."""


class Sinks(BaseSink):
    """Several sinks as one, in their order. A sink that fails is left out with a message to the others."""

    def __init__(self, sinks: Sequence[BaseSink]) -> None:
        self._sinks = list(sinks)

    def start(self, name: str, config: Mapping[str, Any], n_steps: int, step: int) -> None:
        self._each("start", name, config, n_steps, step)

    def metrics(self, metrics: Metrics) -> None:
        self._each("metrics", metrics)

    def histograms(self, step: int, values: Histograms) -> None:
        self._each("histograms", step, values)

    def message(self, text: str) -> None:
        self._each("message", text)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._each("finish", summary)

    def flush(self) -> None:
        self._each("flush")

    def close(self) -> None:
        self._each("close")

    def _each(self, method: str, *args: Any) -> None:
        for sink in list(self._sinks):
            try:
                getattr(sink, method)(*args)
            except Exception as error:
                if getattr(sink, "essential", False):
                    raise
                self._sinks.remove(sink)
                self.message(f"{type(sink).__name__} failed and is left out from here on: {error!r}")
