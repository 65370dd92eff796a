"""Weights & Biases, under the metric names that SAELens users chart. Imported only when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from train.log import BaseSink, Histograms, Metrics

# Ours -> theirs; other names stay as they are.
NAMES = {
    "loss": "losses/overall_loss",
    "l0": "metrics/l0",
    "fvu": "metrics/fvu",
    "explained_variance": "metrics/explained_variance",
    "dead": "sparsity/dead_fraction",
    "n_dead": "sparsity/dead_features",
    "mean_passes_since_fired": "sparsity/mean_passes_since_fired",
    "below_dead_threshold": "sparsity/below_dead_threshold",
    "never_fired": "sparsity/never_fired",
    "resampled": "sparsity/resampled",
    "mean_log10_density": "metrics/mean_log10_feature_sparsity",
    "log10_density": "plots/feature_density_line_chart",
    "tokens_since_fired": "sparsity/tokens_since_fired",
    "mse": "metrics/mse",
    "losses/mse": "losses/mse_loss",
    "losses/l1": "losses/l1_loss",
    "losses/l0": "losses/l0_loss",
    "losses/auxk": "losses/auxiliary_reconstruction_loss",
    "losses/dead": "losses/pre_act_loss",
    "grad_norm": "details/grad_norm",
    "lr": "details/current_learning_rate",
    "tokens": "details/n_training_samples",
    "tokens_per_second": "details/tokens_per_second",
    "epoch": "details/epoch",
    "rejected": "details/rejected_batches",
    "seconds": "details/seconds",
}


NOT_CHARTED = ("step", "cursor")


def chart_name(name: str) -> str:
    """The name under which a metric of ours is charted."""
    return f"details/{name}" if name.startswith("grad_norm/") else NAMES.get(name, name)


def charted(metrics: Metrics) -> dict[str, float | int]:
    """One line of metrics under the names of the charts; `losses/mse_loss` is there whatever loss is minimised."""
    named = {chart_name(name): value for name, value in metrics.items() if name not in NOT_CHARTED}
    if "mse" in metrics:
        named.setdefault("losses/mse_loss", metrics["mse"])
    return named


def _histogram(values: Tensor) -> tuple[Any, Any]:
    """64 counts and 65 edges of the finite values; equal values, of which numpy makes no bins, get a bin of width 1."""
    finite = values[values.isfinite()].double().cpu().numpy()
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(finite, bins=64, range=(low, high))
    return counts, edges


class WandbSink(BaseSink):
    """One wandb run; `run_id` continues an earlier one. wandb's own failures are the caller's to ignore (`Sinks`)."""

    def __init__(self, folder: Path, project: str, mode: Literal["offline", "online"], run_id: str) -> None:
        self.folder, self.project, self.mode, self.run_id = folder, project, mode, run_id
        self._run: Any = None

    def start(self, name: str, config: Mapping[str, Any], n_steps: int, step: int) -> None:
        """Open the run."""
        import wandb

        self._run = wandb.init(
            project=self.project,
            name=name,
            id=self.run_id,
            resume="allow" if self.mode == "online" else None,
            dir=str(self.folder),
            mode=self.mode,
            reinit="create_new",  # a sweep has several open at a time
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, x_save_requirements=False),
        )

    def metrics(self, metrics: Metrics) -> None:
        """Log one line at its step."""
        self._run.log(charted(metrics), step=int(metrics["step"]))

    def histograms(self, step: int, values: Histograms) -> None:
        """Log them at their step."""
        import wandb

        drawn = {chart_name(name): wandb.Histogram(np_histogram=_histogram(value)) for name, value in values.items()}
        self._run.log(drawn, step=step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Store the final evaluation."""
        for name, value in summary.items():
            if isinstance(value, int | float | str):
                self._run.summary[f"final/{name}"] = value

    def close(self) -> None:
        """Close the run."""
        if self._run is not None:
            self._run.finish()
