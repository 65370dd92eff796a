"""`sae-analyze report`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae_granary.analyze.commands.shared import (
    INTERRUPTED,
    CacheFolder,
    Device,
    Hook,
    Incomplete,
    names_in,
)
from sae_granary.common.app import Debug, Quiet, echo, expected_errors
from sae_granary.common.errors import ConfigError

if TYPE_CHECKING:
    from sae_granary.analyze.encoding.codes import StoredCodes

Runs = Annotated[
    list[Path],
    typer.Argument(help="Folder of a run or of any SAE; a sweep, or several runs, are compared.", metavar="RUN..."),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="(default: report.html in the folder of the run)")]


def report(
    runs: Runs,
    cache: CacheFolder = None,
    out: Out = None,
    hook: Hook = "",
    device: Device = "auto",
    allow_incomplete: Incomplete = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write one HTML file: training, and every latent with its examples. Of several runs, a page that compares them.

    The file needs no network and no other file. Encodes the cache and computes the statistics first where missing.
    """
    with expected_errors(debug, interrupted=INTERRUPTED):
        from sae_granary.analyze.report.report import FILE, report_comparison
        from sae_granary.analyze.report.run_facts import runs_in

        found = runs_in(runs)
        if len(found) == 1 and found[0] == runs[0]:
            path = out or found[0] / FILE
            _report_one(found[0], path, cache, hook, device, allow_incomplete, quiet)
        else:
            if cache is not None or hook:
                raise ConfigError("--cache and --hook are for the report of one run, a comparison reads no cache")
            common = runs[0] if len(runs) == 1 else Path(os.path.commonpath([run.resolve().parent for run in found]))
            path = out or common / FILE
            report_comparison(found, path, common.resolve().name)
        echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def _report_one(
    run: Path, path: Path, cache: Path | None, hook: str, device: str, allow_incomplete: bool, quiet: bool
) -> None:
    from sae_granary.analyze.encoding.encode import encode_cache
    from sae_granary.analyze.latents.stats import find_stats
    from sae_granary.analyze.progress import row_progress
    from sae_granary.analyze.report.report import report_run
    from sae_granary.analyze.source import open_source
    from sae_granary.common.process import tuned_process

    with tuned_process(device):
        source = open_source(run, cache, hooks=names_in(hook), device=device, allow_incomplete=allow_incomplete)

        def make_codes() -> StoredCodes:
            with row_progress("encoding", source.cache.n_rows, quiet=quiet) as tick:
                return encode_cache(source, source.place / "codes", tick=tick)

        codes = make_codes()
        report_run(run, path, find_stats(source, lambda: codes), source, codes)
