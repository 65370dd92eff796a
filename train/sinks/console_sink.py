"""The console: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sae_granary.common.app import make_console
from sae_granary.common.quantities import duration, quantity
from sae_granary.train.sinks.sink import BaseSink, Metrics

PLAIN_SECONDS = 5.0  # at least, between two plain lines


class ConsoleSink(BaseSink):
    """Loss, L0, FVU, dead latents, rows per second and time left."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or make_console(stderr=True)
        self._progress: Progress | None = None
        self._last = -PLAIN_SECONDS
        self._n_steps = 0

    def start(self, name: str, config: Mapping[str, Any], n_steps: int, step: int) -> None:
        """Show the first step."""
        self._n_steps = n_steps
        for line in settings_lines(config):
            self.console.print(escape(line), style="dim", soft_wrap=True)
        if not self.console.is_terminal:
            return
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self.console)
        self._task = self._progress.add_task(escape(name), total=n_steps, completed=step, numbers="")
        self._progress.start()

    def metrics(self, metrics: Metrics) -> None:
        """Update the live line, or print a line occasionally."""
        step = int(metrics["step"])
        if "loss" not in metrics and "grad_norm" in metrics:
            return  # a step that was not measured, with numbers of a callback
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=numbers(metrics))
            return
        now = time.monotonic()
        if now - self._last >= PLAIN_SECONDS or step == self._n_steps:
            self._last = now
            rate = float(metrics.get("tokens_per_second", 0.0))
            rows_per_step = float(metrics["tokens"]) / max(step, 1)
            left = (self._n_steps - step) * rows_per_step / rate if rate else 0.0
            self.console.print(
                f"step {step}/{self._n_steps}  {numbers(metrics)}  {duration(left)} left", soft_wrap=True
            )

    def message(self, text: str) -> None:
        self.console.print(escape(text), soft_wrap=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def settings_lines(sections: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The resolved settings, one line per section; unset ones are omitted."""
    lines = []
    for section, values in sections.items():
        shown = [f"{key}={_short(value)}" for key, value in values.items() if value is not None and value != []]
        lines.append(f"{section:<9}{' '.join(shown)}")
    return lines


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def numbers(metrics: Metrics) -> str:
    """One line with the most important numbers."""
    if "loss" not in metrics:
        return "batch rejected"
    held_out = f"held out {metrics['val/fvu']:.4f}  " if "val/fvu" in metrics else ""
    fvu = f"{metrics['fvu']:.4f}" if "fvu" in metrics else "n/a"
    return (
        f"loss {metrics['loss']:.4f}  L0 {metrics['l0']:.1f}  FVU {fvu}  {held_out}"
        f"dead {metrics['dead']:.1%}  {quantity(metrics['tokens_per_second'])} tok/s"
    )
