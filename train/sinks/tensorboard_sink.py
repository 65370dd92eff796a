"""TensorBoard event files in the run's folder; needs the extra `tensorboard`, which is imported only when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.sinks.chart_names import chart_name, charted
from sae_granary.train.sinks.registry import register
from sae_granary.train.sinks.sink import BaseSink, Histograms, Metrics

FOLDER = "tensorboard"


class TensorboardSink(BaseSink):
    """Scalars and histograms under the names of the charts: `tensorboard --logdir runs`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER
        self._writer: Any = None

    def start(self, name: str, config: Mapping[str, Any], n_steps: int, step: int) -> None:
        """Open the files; what an interrupted run wrote behind its checkpoint is hidden."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError('tensorboard is not installed: pip install "sae-granary[tensorboard]"') from None
        self._writer = SummaryWriter(str(self.folder), purge_step=step + 1 if step else None)

    def metrics(self, metrics: Metrics) -> None:
        for name, value in charted(metrics).items():
            self._writer.add_scalar(name, value, int(metrics["step"]))

    def histograms(self, step: int, values: Histograms) -> None:
        for name, value in values.items():
            self._writer.add_histogram(chart_name(name), value[value.isfinite()].cpu(), step)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@register
def opened(config: TrainConfig, folder: Path, run_id: str) -> TensorboardSink | None:
    return TensorboardSink(folder) if config.tensorboard else None
