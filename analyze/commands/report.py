"""`sae-analyze report`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_granary.analyze.commands.options import takes_options
from sae_granary.analyze.commands.shared import INTERRUPTED, codes_of, source_of, working
from sae_granary.analyze.settings import Report
from sae_granary.common.app import Debug, Quiet, echo, expected_errors
from sae_granary.common.errors import ConfigError

Runs = Annotated[
    list[Path],
    typer.Argument(help="Folder of a run or of any SAE; a sweep, or several runs, are compared.", metavar="RUN..."),
]


@takes_options(Report)
def report(read_options: Callable[[], Report], runs: Runs, quiet: Quiet = False, debug: Debug = False) -> None:
    """Write one HTML file: training, and every latent with its examples. Of several runs, a page that compares them.

    The file needs no network and no other file. Encodes the cache and computes the statistics first where missing.
    """
    with expected_errors(debug, interrupted=INTERRUPTED):
        options = read_options()
        from sae_granary.analyze.report.report import FILE, report_comparison
        from sae_granary.analyze.report.run_facts import runs_in

        found = runs_in(runs)
        if found == runs[:1]:
            path = options.out or found[0] / FILE
            facts = _report_one(found[0], path, options, quiet)
        else:
            if options.cache is not None or options.hook:
                raise ConfigError("--cache and --hook are for the report of one run: a comparison reads no cache")
            common = runs[0] if len(runs) == 1 else Path(os.path.commonpath([run.resolve().parent for run in found]))
            path = options.out or common / FILE
            facts = report_comparison(found, path, common.resolve().name)
        echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
        for folder, extension in ((options.png, "png"), (options.svg, "svg")):
            if folder is not None:
                from sae_granary.analyze.report.figures import save_plots

                echo(f"{folder}: {', '.join(file.name for file in save_plots(facts, folder, extension))}")


def _report_one(run: Path, path: Path, options: Report, quiet: bool) -> dict[str, Any]:
    """Write the page of a run; where its own cache is gone that of the statistics that are stored."""
    from sae_granary.analyze.errors import CacheGoneError
    from sae_granary.analyze.latents.stats import find_stats
    from sae_granary.analyze.report.report import report_run, stored_stats

    with working(options):
        try:
            source = source_of(run, options)
        except CacheGoneError as error:
            stats = stored_stats(run) if options.cache is None else None
            if stats is None:
                raise
            echo(f"{error}; this report has the stored statistics, without texts", err=True, color="yellow")
            return report_run(run, path, stats)
        codes = codes_of(source, quiet)
        return report_run(run, path, find_stats(source, lambda: codes), source, codes)
