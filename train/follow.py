"""What follows a step, checkpoints apart: resampling, validation, firing rates, callbacks, and a line of metrics."""

from __future__ import annotations

from sae_granary.cache.load.loader import LoaderState
from sae_granary.train import validate
from sae_granary.train.callbacks import Callbacks, StepEvent
from sae_granary.train.config.phases import first_window_step
from sae_granary.train.data.run_data import RunData
from sae_granary.train.optim import resample
from sae_granary.train.sinks.metrics_line import finite, histograms_of, metrics_of
from sae_granary.train.sinks.sink import Sinks
from sae_granary.train.state.clock import Clock
from sae_granary.train.state.run_state import Run


class Follower:
    """Follows the steps of one run."""

    def __init__(self, data: RunData, run: Run, sinks: Sinks, clock: Clock, callbacks: Callbacks) -> None:
        self._data, self._run, self._sinks, self._clock, self._callbacks = data, run, sinks, clock, callbacks

    def step(self, event: StepEvent, state: LoaderState) -> None:
        """Follow a step; `state` is that of the stream behind it."""
        run, result = self._run, event.result
        if result.fired is not None:
            run.density.update(result.fired, result.n_measured)
        if "fvu" in result.metrics and not run.config.eval_every:
            run.score = result.metrics["fvu"]
        numbers = {**self._resample(state), **self._validate(), **self._densities(), **self._callbacks.on_step(event)}
        if result.metrics or not result.accepted or numbers:
            self._sinks.metrics({**finite(numbers), **metrics_of(run, state, result, self._clock)})

    def _resample(self, state: LoaderState) -> dict[str, float]:
        run, first_window = self._run, first_window_step(self._run.config)
        if not resample.is_due(run):
            return {}
        if first_window is not None and run.step > first_window:  # the state is that of the windows
            state = LoaderState(self._data.order.seed)
        with self._clock, run.rng:
            return {"resampled": resample.resample_dead(run, self._data.upcoming(state, run.config.resample_rows))}

    def _validate(self) -> dict[str, float]:
        return validate.validate(self._run, self._data.validation) if validate.is_due(self._run) else {}

    def _densities(self) -> dict[str, float]:
        run, every = self._run, self._run.config.density_every
        if not run.density.n_rows or not (run.done or (every > 0 and run.step % every == 0)):
            return {}
        numbers = run.density.numbers(run.config.dead_threshold)
        self._sinks.histograms(run.step, histograms_of(run))
        run.density.clear()
        return numbers
