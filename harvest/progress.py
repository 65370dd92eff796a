"""What a harvest prints: a bar or lines while it runs, the table at its end, and the log beside the data."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_granary.cache.format.layout import LOG
from sae_granary.cache.write.about import record_about
from sae_granary.common.app import make_console
from sae_granary.common.errors import printable
from sae_granary.common.quantities import byte_size, duration
from sae_granary.harvest.text.document import skipped_counts

if TYPE_CHECKING:
    from sae_granary.harvest.result import HarvestResult

_LINE_SECONDS = 10.0  # between lines when there is no terminal


class Progress:
    """A bar on a terminal, plain lines elsewhere; both on standard error."""

    def __init__(self, unit: str, total: int | None, *, quiet: bool = False) -> None:
        self._console = make_console(stderr=True)
        self._unit, self._total, self._done, self._first = unit, total, 0, 0
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._start = self._last = time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if not self._quiet:
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def begin(self, done: int) -> None:
        """Count rows and time from now on; `done` rows are there already."""
        self._done = self._first = done
        self._start = self._last = time.perf_counter()
        if self._console.is_terminal and not self._quiet and self._bar is None:
            self._open_bar()

    def advance(self, n_rows: int, bytes_written: int) -> None:
        """n more rows went through the model."""
        self._done += n_rows
        if self._quiet:
            return
        if self._bar is not None:
            told = {"rate": f"{self._rate():,.0f}", "size": byte_size(bytes_written)}
            self._bar.update(self._task, completed=self._done, **told)
            return
        now = time.perf_counter()
        if now - self._last >= _LINE_SECONDS:
            self._last = now
            self.say(self._line(bytes_written))

    def _rate(self) -> float:
        return (self._done - self._first) / max(1e-9, time.perf_counter() - self._start)

    def _line(self, bytes_written: int) -> str:
        of = f" of {self._total:,}" if self._total else ""
        rate = self._rate()
        known = self._total and self._done < self._total and rate > 0  # processes tell their rows some seconds late
        eta = f", {duration((self._total - self._done) / rate)} left" if self._total and known else ""
        return f"{self._done:,}{of} {self._unit}s, {rate:,.0f} {self._unit}s/s, {byte_size(bytes_written)} written{eta}"

    def _open_bar(self) -> None:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("harvest"),
            BarColumn(),
            TextColumn("{task.completed:,}"),
            TextColumn(f"{self._unit}s  {{task.fields[rate]}} {self._unit}s/s  {{task.fields[size]}}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=self._total, completed=self._done, rate="-", size="0 MiB")
        self._bar.start()


class RunLog:
    """`harvest.log` beside the data: times, retries, memory, throughput; nothing that is compared or checked.

    Collects lines, and writes them when the run ends: a cache that was not begun keeps no log.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOG
        self._lines: list[str] = []

    def write(self, message: str) -> None:
        """One line with the time."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._lines.append(f"{stamp} {message.replace(chr(10), ' | ')}\n")

    def close(self, *, keep: bool) -> None:
        """Append the lines to the file, if there is room: a full disk is reported elsewhere."""
        if keep and self._lines and (self._path.is_file() or not self._path.exists()):
            with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as stream:
                stream.writelines(self._lines)
            record_about(self._path.parent)
        self._lines = []


def summary_rows(result: HarvestResult) -> list[tuple[str, str]]:
    """The table at the end of a harvest."""
    unit = "tokens" if result.unit == "token" else "texts"
    rows = [
        ("cache", str(result.path)),
        ("hook points", ", ".join(f"{name} ({width})" for name, width in result.hooks)),
        ("rows", f"{result.n_rows:,} {unit}, {result.dtype}"),
        ("documents", f"{result.n_docs:,}"),
        ("shards", f"{result.n_shards:,}"),
        ("bytes", f"{result.n_bytes:,} ({byte_size(result.n_bytes)})"),
    ]
    rows += [("storage FVU", f"{error} ({hook})") for hook, error in result.storage_errors]
    if result.resumed_rows:
        rows.append(("continued", f"{result.resumed_rows:,} rows were there already"))
    if result.seconds:
        rows += [
            ("time", duration(result.seconds)),
            ("throughput", f"{result.rows_per_second:,.0f} {unit}/s, {result.padding:.1%} padding"),
            ("limit", ", ".join(f"{stage} {share:.0%}" for stage, share in result.busy)),
        ]
    rows.append(("skipped", skipped_counts(dict(result.skipped)) or "none"))
    if result.repaired:
        rows.append(("repaired", f"{result.repaired:,} documents with invalid bytes or characters"))
    return rows


def print_table(rows: Iterable[tuple[str, str]], title: str) -> None:
    """Two columns: a table on a terminal, plain lines elsewhere."""
    if not sys.stdout.isatty():
        lines = [title, *(f"  {name:<12} {value}" for name, value in rows)]
        sys.stdout.write("\n".join(map(printable, lines)) + "\n")
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows:
        table.add_row(name, Text(printable(value)))
    make_console().print(table)
