"""Weights & Biases, under the metric names that SAELens users chart. Imported only when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from train.log import BaseSink, Metrics

# Ours -> theirs; other names stay as they are.
NAMES = {
    "loss": "losses/overall_loss",
    "l0": "metrics/l0",
    "fvu": "metrics/fvu",
    "explained_variance": "metrics/explained_variance",
    "dead": "sparsity/dead_fraction",
    "n_dead": "sparsity/dead_features",
    "grad_norm": "details/grad_norm",
    "lr": "details/current_learning_rate",
    "tokens": "details/n_training_samples",
    "tokens_per_second": "details/tokens_per_second",
    "epoch": "details/epoch",
    "rejected": "details/rejected_batches",
}


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
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, x_save_requirements=False),
        )

    def metrics(self, metrics: Metrics) -> None:
        """Log one line at its step."""
        named = {NAMES.get(name, name): value for name, value in metrics.items() if name not in ("step", "cursor")}
        self._run.log(named, step=int(metrics["step"]))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Store the final evaluation."""
        for name, value in summary.items():
            if isinstance(value, int | float | str):
                self._run.summary[f"final/{name}"] = value

    def close(self) -> None:
        """Close the run."""
        if self._run is not None:
            self._run.finish()
