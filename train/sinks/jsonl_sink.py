"""metrics.jsonl: the log that every run writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_granary.common import files
from sae_granary.common.finished_run import METRICS, read_metrics
from sae_granary.train.sinks.sink import BaseSink, Metrics


class JsonlSink(BaseSink):
    """metrics.jsonl in the run's folder; a resume cuts it back to the checkpoint's step."""

    essential = True  # without its metrics a run is not worth continuing: the disk is full

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / METRICS

    def start(self, name: str, config: Mapping[str, Any], n_steps: int, step: int) -> None:
        """Keep the lines up to the step from which the run continues."""
        kept = [line for line in read_metrics(self.folder) if line["step"] <= step]
        files.write_text(self.path, "".join(f"{json.dumps(line)}\n" for line in kept))

    def metrics(self, metrics: Metrics) -> None:
        with self.path.open("a", encoding="utf-8") as file:  # not held: a sweep has many
            file.write(json.dumps(dict(metrics)) + "\n")

    def flush(self) -> None:
        """Write to the disk, so that no checkpoint is newer than its metrics."""
        files.sync_file(self.path)
