"""The console of a sweep: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from sae_granary.common.app import make_console
from sae_granary.common.quantities import duration, quantity
from sae_granary.train.sinks.console_sink import PLAIN_SECONDS
from sae_granary.train.sinks.sink import BaseSink, Metrics
from sae_granary.train.sweeps.reporter import Reporter
from sae_granary.train.sweeps.sweep_plan import Entry, Group, Plan


class SweepConsole(Reporter):
    """Step, loss, L0, FVU, dead latents and state of every SAE, and the time left of the group."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or make_console(stderr=True)
        self._live: Live | None = None
        self._lines: dict[str, dict[str, Any]] = {}
        self._said: set[str] = set()
        self._group = ""
        self._clock = self._last = time.monotonic()

    def start(self, plan: Plan, group: Group) -> None:
        """Show the members of a group."""
        number, n = plan.groups.index(group) + 1, len(plan.groups)
        self._group = plan.name if n == 1 else f"{plan.name}, group {number} of {n}"
        for entry in group.entries:
            steps = entry.config.steps or 0
            self._lines.setdefault(entry.name, {"state": "waits", "step": 0, "n_steps": steps})
        self._clock = time.monotonic()
        self.console.print(f"{escape(self._group)}: {len(group.entries)} SAEs from one stream", soft_wrap=True)
        if self.console.is_terminal and self._live is None:
            self._live = Live(console=self.console, get_renderable=self._table, refresh_per_second=2)
            self._live.start()

    def sinks(self, entry: Entry) -> Sequence[BaseSink]:
        return [_Line(self, entry.name)]

    def update(self, name: str, **numbers: Any) -> None:
        """New numbers of one SAE."""
        self._lines[name].update(numbers)
        now = time.monotonic()
        if self._live is None and now - self._last >= PLAIN_SECONDS:
            self._last = now
            done = sum(line["step"] for line in self._lines.values())
            total = sum(line["n_steps"] for line in self._lines.values())
            self.console.print(f"steps of all SAEs {done}/{total}  {self._left()} left", soft_wrap=True)

    def ended(self, name: str, how: str) -> None:
        """Mark a line; on no terminal, say it."""
        self._lines.setdefault(name, {"step": 0, "n_steps": 0})["state"] = how
        if self._live is None or how.startswith("failed"):
            self.console.print(f"{escape(name)}: {escape(how)}", soft_wrap=True)

    def message(self, text: str) -> None:
        self.console.print(escape(text), soft_wrap=True)

    def message_once(self, name: str, text: str) -> None:
        """What an SAE says, unless another has said it."""
        if text not in self._said:
            self._said.add(text)
            self.message(f"{name}: {text}")

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _left(self) -> str:
        """Time left by the steps since the group started."""
        active = [line for line in self._lines.values() if line["state"] == "trains"]
        taken = sum(line["step"] - line["from"] for line in active)
        missing = sum(line["n_steps"] - line["step"] for line in active)
        seconds = time.monotonic() - self._clock
        return duration(seconds * missing / taken) if taken else "?"

    def _table(self) -> Table:
        table = Table(title=f"{escape(self._group)}  {self._left()} left", title_justify="left")
        table.add_column("run", overflow="fold")
        for column in ("step", "loss", "L0", "FVU", "dead", "tok/s"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("state", overflow="fold")
        for name, line in self._lines.items():
            numbers = [
                f"{line['loss']:.4f}" if "loss" in line else "",
                f"{line['l0']:.1f}" if "l0" in line else "",
                f"{line['fvu']:.4f}" if "fvu" in line else "",
                f"{line['dead']:.1%}" if "dead" in line else "",
                quantity(line["tokens_per_second"]) if "tokens_per_second" in line else "",
            ]
            table.add_row(escape(name), f"{line['step']}/{line['n_steps']}", *numbers, escape(line["state"]))
        return table


class _Line(BaseSink):
    """The sink of one SAE."""

    def __init__(self, table: SweepConsole, name: str) -> None:
        self.table, self.name = table, name

    def start(self, name: str, config: Mapping[str, Any], n_steps: int, step: int) -> None:
        self.table.update(self.name, **{"state": "trains", "step": step, "from": step})

    def metrics(self, metrics: Metrics) -> None:
        self.table.update(self.name, **metrics)

    def message(self, text: str) -> None:
        """Above the table; what all SAEs say is said once."""
        self.table.message_once(self.name, text)
