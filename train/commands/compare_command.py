"""`sae-train compare`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae_granary.common.app import Debug, echo
from sae_granary.common.errors import ConfigError
from sae_granary.train.commands.shared_flags import errors

if TYPE_CHECKING:
    from rich.table import Table


def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs or sweeps, or folders that contain them.")],
    sort: Annotated[
        str | None, typer.Option(help="Column to sort by: fvu, or -ce_score for the largest first.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with all metrics instead of a table.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV with all metrics instead of a table.")] = False,
    pareto: Annotated[
        Path | None, typer.Option(help="Plot L0 against FVU, with labels, to this file (.png, .svg, .pdf).")
    ] = None,
    curves: Annotated[Path | None, typer.Option(help="Plot the loss curves of all runs to this file.")] = None,
    debug: Debug = False,
) -> None:
    """Print the results of finished runs side by side: `sae-train compare runs/ --sort fvu`."""
    with errors(debug):
        if as_json and as_csv:
            raise ConfigError("--json and --csv: give one of them")
        from sae_granary.common.finished_run import read_metrics, read_summary
        from sae_granary.train.commands.result_tables import show_notes
        from sae_granary.train.result.comparison import comparison_rows, find_runs, sort_rows, warnings
        from sae_granary.train.result.plots import curves as plot_curves
        from sae_granary.train.result.plots import pareto as plot_pareto
        from sae_granary.train.sweeps.results import csv_table

        runs, skipped = find_runs(folders)
        rows = comparison_rows(runs)
        warned = warnings(runs, rows)
        if sort is not None:
            rows = sort_rows(rows, sort)
        if pareto is not None:
            plot_pareto(rows, pareto)
        if curves is not None:
            plot_curves({row["name"]: read_metrics(Path(row["folder"])) for row in rows}, curves)
        for reason in skipped:
            echo(f"skipped: {reason}", err=True)
        for line in warned:
            echo(f"warning: {line}", err=True, color="yellow")
        if as_json:
            echo(json.dumps({"runs": rows}, indent=1))
        elif as_csv:
            echo(csv_table(rows), nl=False)
        else:
            show_comparison(rows)
            show_notes([read_summary(Path(row["folder"])) for row in rows])


# The columns of the table, by names of a row; first those of words.
WORDS = {"name": "run", "type": "type", "hook": "hook", "cache": "cache"}
NUMBERS = {
    "d_sae": "d_sae",
    "target": "target",
    "l0_train": "L0 train",
    "l0": "L0",
    "fvu": "FVU",
    "ce_score": "CE score",
    "kl": "KL",
    "dead": "dead",
    "tokens": "tokens",
    "tokens_per_second": "tok/s",
    "seconds": "time",
}
LEFT_OUT_FIRST = ("seconds", "tokens_per_second", "tokens", "l0_train", "d_sae")  # on a narrow terminal
OPTIONAL = ("ce_score", "kl")  # shown where some run measured them


def show_comparison(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one line per run, with as many columns as the terminal has room for."""
    from sae_granary.common.app import make_console

    console = make_console(width=1000)
    shown = [name for name in NUMBERS if name not in OPTIONAL or any(name in row for row in rows)]
    table, left_out = comparison_table(rows, shown), []
    for name in LEFT_OUT_FIRST:
        if console.measure(table, options=console.options.update(max_width=1000)).maximum <= console.width:
            break
        left_out.append(NUMBERS[name])
        shown.remove(name)
        table = comparison_table(rows, shown)
    console.print(table)
    if left_out:
        echo(f"no room for {', '.join(left_out)}: widen the terminal, or see --csv")


def comparison_table(rows: Sequence[Mapping[str, Any]], numbers: Sequence[str]) -> Table:
    """A table of the columns of words and of some of numbers."""
    from rich.markup import escape
    from rich.table import Table

    from sae_granary.train.commands.result_tables import FORMATS

    table = Table()
    for title in WORDS.values():
        table.add_column(title, overflow="fold")
    for name in numbers:
        table.add_column(NUMBERS[name], justify="right", no_wrap=True)
    for row in rows:
        cells = [escape(str(row[name])) for name in WORDS]
        table.add_row(*cells, *(FORMATS[name](row[name]) if name in row else "" for name in numbers))
    return table
