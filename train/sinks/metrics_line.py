"""The record of a step: a line of metrics, and occasional histograms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sae_granary.cache.load.loader import LoaderState
from sae_granary.common.device import float64
from sae_granary.sae_core.latents import latent_numbers
from sae_granary.train.loop import StepResult
from sae_granary.train.state.clock import Clock
from sae_granary.train.state.run_state import Run

MEASURED = ("l0", "fvu", "explained_variance", "mse")


def metrics_line(run: Run, state: LoaderState, result: StepResult, clock: Clock) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    dead = int(run.sae.dead_mask.sum())
    wanted = {name: value for name in MEASURED if (value := result.metrics.get(name)) is not None}
    numbers = {
        "step": run.step,
        "tokens": run.tokens,
        "epoch": state.epoch,
        "cursor": state.cursor,
        "loss": result.loss,
        **{f"losses/{name}": value for name, value in result.losses.items()},
        **wanted,
        **{f"details/{name}": value for name, value in result.details.items()},
        "dead": dead / run.sae.config.d_sae,
        "n_dead": dead,
        "mean_passes_since_fired": mean_passes_since_fired(run),
        "grad_norm": result.grad_norm,
        **{f"grad_norm/{name}": value for name, value in result.grad_norms.items()},
        "lr": run.last_lr,
        "rejected": run.rejected,
        "seconds": round(clock.seconds, 3),
        "tokens_per_second": round(clock.rate(run.tokens), 1),
    }
    return finite(numbers)


def finite(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Replace NaN and Inf (a rejected batch has no loss), which JSON cannot represent."""
    return {name: value for name, value in numbers.items() if not isinstance(value, float) or math.isfinite(value)}


def mean_passes_since_fired(run: Run) -> float:
    """Steps since a latent fired, averaged over latents."""
    return float(float64(run.sae.core.num_tokens_since_fired).mean()) / run.config.batch_size


def histograms_of(run: Run) -> dict[str, Tensor]:
    """Log10 firing rates, decoder norms, and the latents' own tensors: thresholds, biases."""
    core = run.sae.core
    own = {f"weights/{name}": tensor for name, tensor in latent_numbers(core).items()}
    return {
        "log10_density": run.density.log10,
        "weights/W_dec_norms": core.W_dec.detach().norm(dim=1),
        "tokens_since_fired": float64(core.num_tokens_since_fired),
        **own,
    }
