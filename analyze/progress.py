"""A progress bar of rows on a terminal, elsewhere a line if it takes more than a second (`common.threads.waiting`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sae_granary.common.app import make_console
from sae_granary.common.threads import waiting


@contextmanager
def row_progress(
    label: str, n_rows: int | None, *, unit: str = "rows", quiet: bool = False
) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the number of rows done so far; `n_rows` is None if the total is unknown."""
    console = make_console(stderr=True)
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn(f"{unit}, left"), TimeRemainingColumn())
    if not console.is_terminal:
        with waiting(label) as share:
            yield lambda done: share(done / n_rows if n_rows else 0.0)
        return
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("", total=n_rows)
        yield lambda done: bar.update(task, completed=done)
