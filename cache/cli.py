"""sae-cache: list, describe and verify activation caches. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae_granary.common.app import Debug, expected_errors, make_app, make_console
from sae_granary.common.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from sae_granary.cache.read.verify import Report

app = make_app("sae-cache", "List, describe and verify activation caches.")

CachePath = Annotated[Path, typer.Argument(help="Folder of a cache, e.g. cache/bert_l6.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.command()
def ls(
    root: Annotated[Path, typer.Argument(help="Folder that holds caches.")] = Path("cache"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the caches below a folder."""
    with expected_errors(debug):
        from sae_granary.cache.read.listing import list_caches

        entries = list_caches(root)
        if as_json:
            print_json([vars(entry) for entry in entries])
            return
        if not entries:
            _console().print(f"no caches in {root}; `sae-harvest run` makes one", markup=False)
            return
        from rich.table import Table

        table = Table("cache", "model", "hook points", "rows", "dtype", "size", "state")
        for entry in entries:
            table.add_row(*(_plain(text) for text in entry.cells()))
        _console().print(table)
        for entry in entries:
            if entry.error is not None:
                _console().print(_plain(entry.error, "red"), soft_wrap=True)


@app.command()
def info(path: CachePath, as_json: Json = False, debug: Debug = False) -> None:
    """Describe a cache: what it was harvested from, its rows, and the statistics of each hook point."""
    with expected_errors(debug):
        from sae_granary.cache.read import render
        from sae_granary.cache.read.reader import open_cache

        cache = open_cache(path, allow_incomplete=True)
        statistics = {name: cache.stats(name) for name in cache.hook_points} if cache.n_rows else {}
        if as_json:
            print_json(render.as_json(cache.path, cache.manifest, cache.opened, statistics))
            return
        from rich.table import Table

        console = _console()
        table = Table(show_header=False, box=None)
        for label, value in {**cache.facts(), **render.provenance_lines(cache.manifest)}.items():
            table.add_row(_plain(label, "bold"), _plain(value))
        console.print(table)
        if statistics:
            norms = Table("hook point", "mean |x|²", "total variance", "|x| min", "1 %", "median", "99 %", "max")
            for name, stats in statistics.items():
                norms.add_row(*(_plain(cell) for cell in render.stats_cells(name, stats)))
            console.print(norms)


@app.command()
def verify(
    paths: Annotated[list[Path], typer.Argument(help="Folders of caches, e.g. cache/bert_l6.", show_default=False)],
    quick: Annotated[bool, typer.Option("--quick", help="Existence and sizes only, no checksums.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check every file of caches: checksums, Zarr metadata, statistics, row order. Exit code 1 if any is wrong."""
    with expected_errors(debug):
        from sae_granary.cache.format.records import load_manifest
        from sae_granary.cache.read import verify as checks
        from sae_granary.cache.read.arrays import truncated_shards
        from sae_granary.common.signals import explain_bus_errors

        explain_bus_errors(truncated_shards)
        for path in paths:
            load_manifest(path)  # no cache at all is an error, not a finding
        reports = {}
        for path in paths:
            reports[path] = _with_progress(path, quick)
            if not as_json:
                _print_report(path, reports[path], quick)
        if as_json:
            bodies = [checks.report_json(report) for report in reports.values()]
            print_json(bodies[0] if len(paths) == 1 else {str(p): b for p, b in zip(reports, bodies, strict=True)})
    if not all(report.ok for report in reports.values()):
        raise typer.Exit(1)


def _print_report(path: Path, report: Report, quick: bool) -> None:
    from sae_granary.common.quantities import byte_size

    console = _console()
    for finding in report.problems:
        console.print(_plain(f"{finding.path}: {finding.problem}", "red"), soft_wrap=True)
    for name in report.foreign:
        console.print(_plain(f"{name}: not part of the cache"), soft_wrap=True)
    checked = "sizes" if quick else f"{len(report.findings)} files, {byte_size(report.n_bytes)}"
    n = len(report.problems)
    state = "ok" if report.ok else f"{n} problem{'s' if n > 1 else ''}"
    state += "" if report.complete else ", incomplete: the harvest has not finished"
    console.print(_plain(f"{path}: {state} ({checked})", "green" if report.ok else "red"), soft_wrap=True)


def _with_progress(path: Path, quick: bool) -> Report:
    from rich.progress import Progress

    from sae_granary.cache.read import verify as checks

    console = _console(stderr=True)
    with Progress(console=console, transient=True, disable=quick or not console.is_terminal) as bar:
        task = bar.add_task("verifying", total=None)
        return checks.verify(
            path, quick=quick, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )


def print_json(body: object) -> None:
    """Print JSON to standard output."""
    sys.stdout.write(json.dumps(body, indent=2) + "\n")


def _console(*, stderr: bool = False) -> Console:
    return make_console(stderr=stderr, width=200)


def _plain(text: str, style: str = "") -> Text:
    """Text that is never read as markup or as control characters, whatever a manifest says."""
    from rich.text import Text

    return Text(printable(text), style=style)


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
