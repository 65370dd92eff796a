"""Weights & Biases, under the metric names that SAELens users chart. wandb is imported only when asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from sae_granary.common.device import float64
from sae_granary.common.finished_run import CONFIG, SAE_FILES
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.sinks.chart_names import chart_name, charted
from sae_granary.train.sinks.registry import register
from sae_granary.train.sinks.sink import BaseSink, Histograms, Metrics


def _histogram(values: Tensor) -> tuple[Any, Any]:
    """64 counts and 65 edges of the finite values; equal values, of which numpy makes no bins, get a bin of width 1."""
    finite = float64(values[values.isfinite()].cpu()).numpy()
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(finite, bins=64, range=(low, high))
    return counts, edges


ARTIFACT_FILES = (*SAE_FILES, CONFIG)


class WandbSink(BaseSink):
    """One wandb run; `run_id` continues an earlier one. wandb's own failures are the caller's to ignore (`Sinks`)."""

    def __init__(
        self, folder: Path, project: str, mode: Literal["offline", "online"], run_id: str, *, artifacts: bool = False
    ) -> None:
        self.folder, self.project, self.mode, self.run_id, self.artifacts = folder, project, mode, run_id, artifacts
        self._run: Any = None

    def start(self, name: str, config: Mapping[str, Any], n_steps: int, step: int) -> None:
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
        self._run.log(charted(metrics), step=int(metrics["step"]))

    def histograms(self, step: int, values: Histograms) -> None:
        import wandb

        drawn = {chart_name(name): wandb.Histogram(np_histogram=_histogram(value)) for name, value in values.items()}
        self._run.log(drawn, step=step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Store the final evaluation and, if asked for, the SAE's files as an artifact."""
        numbers = {**summary, **{f"eval/{name}": value for name, value in summary["eval"].items()}}
        for name, value in numbers.items():
            if isinstance(value, int | float | str):
                self._run.summary[f"final/{name}"] = value
        if self.artifacts:
            self._log_artifact()

    def _log_artifact(self) -> None:
        import wandb

        artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9._-]", "-", self.folder.name)[:128], type="model")
        for path in sorted(p for p in self.folder.iterdir() if p.name in ARTIFACT_FILES):
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


@register
def opened(config: TrainConfig, folder: Path, run_id: str) -> WandbSink | None:
    if config.wandb == "off":
        return None
    return WandbSink(folder, config.wandb_project, config.wandb, run_id, artifacts=config.wandb_artifacts)
