"""`sae-cache verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae_granary.cache.commands.shared import CachePaths, Json, console, plain, print_json, progress_bar
from sae_granary.common.app import Debug, expected_errors

if TYPE_CHECKING:
    from sae_granary.cache.read.verify import Report


def verify(
    paths: CachePaths,
    quick: Annotated[bool, typer.Option("--quick", help="Existence and sizes only, no checksums.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check every file of caches: checksums, Zarr metadata, statistics, row order. Exit code 1 if any is wrong."""
    with expected_errors(debug):
        from sae_granary.cache.format.places import refuse_partial
        from sae_granary.cache.format.records import load_manifest
        from sae_granary.cache.read import verify as checks
        from sae_granary.cache.read.arrays import truncated_shards
        from sae_granary.common.signals import explain_bus_errors

        explain_bus_errors(truncated_shards)
        for path in paths:
            refuse_partial(path)
            load_manifest(path)  # no cache at all is an error, not a finding
        reports = {}
        for path in paths:
            with progress_bar("verifying", hidden=quick) as tell:
                reports[path] = checks.verify(path, quick=quick, progress=tell)
            if not as_json:
                _print_report(path, reports[path], quick)
        if as_json:
            bodies = [checks.report_json(report) for report in reports.values()]
            print_json(bodies[0] if len(paths) == 1 else {str(p): b for p, b in zip(reports, bodies, strict=True)})
    if not all(report.ok for report in reports.values()):
        raise typer.Exit(1)


def _print_report(path: Path, report: Report, quick: bool) -> None:
    from sae_granary.common.quantities import byte_size, counted

    out = console()
    for finding in report.problems:
        out.print(plain(f"{finding.path}: {finding.problem}", "red"), soft_wrap=True)
    if report.problems and report.complete:
        out.print(plain(f"restore them: sae-harvest repair {path} (--dry-run lists what it would do)"), soft_wrap=True)
    for name in report.foreign:
        out.print(plain(f"{name}: not part of the cache"), soft_wrap=True)
    checked = "sizes" if quick else f"{len(report.findings)} files, {byte_size(report.n_bytes)}"
    state = "ok" if report.ok else counted(len(report.problems), "problem")
    state += "" if report.complete else ", incomplete: the harvest has not finished"
    out.print(plain(f"{path}: {state} ({checked})", "green" if report.ok else "red"), soft_wrap=True)
