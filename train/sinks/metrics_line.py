"""The record of a step: a line of metrics, and occasional histograms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sae_granary.cache.load.loader import LoaderState
from sae_granary.common.device import float64
from sae_granary.sae_core.kernels.deferred import host_waits
from sae_granary.sae_core.latents import latent_numbers
from sae_granary.train.loop import StepResult
from sae_granary.train.sinks.sink import Sinks
from sae_granary.train.state.clock import Clock
from sae_granary.train.state.readback import Readback
from sae_granary.train.state.run_state import Run

MEASURED = ("l0", "fvu", "explained_variance", "mse")


class Line:
    """One line of metrics.jsonl, of a step just taken: reading it waits until the device has computed its numbers."""

    def __init__(
        self, run: Run, state: LoaderState, result: StepResult, clock: Clock, numbers: Mapping[str, float]
    ) -> None:
        shards = run.sae.shards
        self._numbers, self._result, self._d_sae = finite(numbers), result, run.sae.config.d_sae * shards.n
        silent = shards.average(float64(run.sae.core.num_tokens_since_fired).mean())
        self._latents = Readback(latents={"dead": shards.sum(run.sae.dead_mask.sum()), "silent": silent})
        self._batch_size = run.config.batch_size
        self._first = {"step": run.step, "tokens": run.tokens, "epoch": state.epoch, "cursor": state.cursor}
        self._last = {
            "lr": run.last_lr,
            "rejected": run.rejected,
            "seconds": round(clock.seconds, 3),
            "tokens_per_second": round(clock.rate(run.tokens), 1),
        }

    def read(self) -> dict[str, Any]:
        """The numbers by name."""
        result, found = self._result, self._result.measured
        metrics = result.metrics
        wanted = {name: value for name in MEASURED if (value := metrics.get(name)) is not None}
        latents = self._latents["latents"]
        dead, grad_norms = int(latents["dead"]), {} if found is None else found.grad_norms
        numbers = {
            **self._first,
            "loss": result.loss,
            **{f"losses/{name}": value for name, value in result.losses.items()},
            **wanted,
            **{f"details/{name}": value for name, value in result.details.items()},
            "dead": dead / self._d_sae,
            "n_dead": dead,
            "mean_passes_since_fired": latents["silent"] / self._batch_size,
            "grad_norm": result.grad_norm,
            **{f"grad_norm/{name}": value for name, value in grad_norms.items()},
            **self._last,
        }
        return {**self._numbers, **finite(numbers)}


class Lines:
    """Writes the lines of a run: on a CPU at once, on a GPU one step later, when the numbers are there."""

    def __init__(self, run: Run, sinks: Sinks) -> None:
        self._run, self._sinks = run, sinks
        self._waiting: Line | None = None

    def put(self, line: Line) -> None:
        """Take the line of the step just taken."""
        self.write()
        self._waiting = line
        if not host_waits(self._run.sae.core.W_dec):
            self.write()

    def write(self) -> None:
        """Write the line that waits, if one does."""
        if (line := self._waiting) is None:
            return
        self._waiting, numbers = None, line.read()
        if (fvu := numbers.get("fvu")) is not None and not self._run.config.eval_every:
            self._run.score = fvu
        self._sinks.metrics(numbers)


def finite(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Replace NaN and Inf (a rejected batch has no loss), which JSON cannot represent."""
    return {name: value for name, value in numbers.items() if not isinstance(value, float) or math.isfinite(value)}


def histograms_of(run: Run) -> dict[str, Tensor]:
    """Log10 firing rates, decoder norms, and the latents' own tensors: thresholds, biases."""
    core = run.sae.core
    own = {f"weights/{name}": tensor for name, tensor in latent_numbers(core).items()}
    histograms = {
        "log10_density": run.density.log10,
        "weights/W_dec_norms": core.W_dec.detach().norm(dim=1),
        "tokens_since_fired": float64(core.num_tokens_since_fired),
        **own,
    }
    return {name: torch.cat(run.sae.shards.gather(values)) for name, values in histograms.items()}
