"""What is written about a run: a line of metrics.jsonl, and summary.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_granary.cache.load.loader import LoaderState
from sae_granary.models.language.losses import notes_on
from sae_granary.train.data.run_data import RunData
from sae_granary.train.loop import StepResult
from sae_granary.train.sinks.sink import read_metrics
from sae_granary.train.state.clock import Clock
from sae_granary.train.state.run_state import Run

MEASURED = ("l0", "fvu", "explained_variance", "mse")


def metrics_of(run: Run, state: LoaderState, result: StepResult, clock: Clock) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    dead = int(run.sae.dead_mask.sum())
    wanted = {name: result.metrics[name] for name in MEASURED if name in result.metrics}
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
    """Without NaN and Inf (a rejected batch has no loss): JSON has no words for them."""
    return {name: value for name, value in numbers.items() if not isinstance(value, float) or math.isfinite(value)}


def mean_passes_since_fired(run: Run) -> float:
    """Steps since a latent fired, averaged over latents."""
    return float(run.sae.core.num_tokens_since_fired.double().mean()) / run.config.batch_size


def histograms_of(run: Run) -> dict[str, Tensor]:
    """Log10 firing rates, decoder norms, and the latents' own tensors: thresholds, biases."""
    core = run.sae.core
    own = {f"weights/{name}": tensor for name, tensor in core.latent_tensors().items()}
    return {
        "log10_density": run.density.log10,
        "weights/W_dec_norms": core.W_dec.detach().norm(dim=1),
        "tokens_since_fired": core.num_tokens_since_fired.double(),
        **own,
    }


def summarize(
    run: Run, data: RunData, numbers: Mapping[str, float | None], l0_train: float | None, seconds: float
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
        "dead_threshold": config.dead_threshold,
        "dead_after_tokens": config.options.get("dead_after_tokens"),
        "eval_part": data.eval_part,
        "eval": dict(numbers),
        "notes": notes_on(numbers),
        "rows": data.counts.to_json(),
        "device": config.device,
        "versions": {"torch": torch.__version__},
        "seconds": round(seconds, 3),
        "tokens_per_second": round(run.tokens / max(seconds, 1e-9), 1),
    }


def last_training_l0(folder: Path) -> float | None:
    """L0 of the training activation on the last measured batch."""
    values = [line["l0"] for line in read_metrics(folder) if "l0" in line]
    return float(values[-1]) if values else None
