"""`sae-analyze eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae_granary.analyze.commands.shared import CacheFolder, Device, Hook, Incomplete, names_in
from sae_granary.common.app import Debug, Quiet, echo, expected_errors
from sae_granary.common.errors import ConfigError, GranaryError
from sae_granary.common.quantities import parse_count

if TYPE_CHECKING:
    from sae_granary.analyze.evaluation.downstream import Models
    from sae_granary.analyze.source import Source
    from sae_granary.cache.load.selection import Part

PARTS = ("heldout", "train", "all")


def evaluate(
    saes: Annotated[
        list[Path], typer.Argument(help="Folders of runs, or of any SAEs that can be loaded.", metavar="SAE...")
    ],
    cache: CacheFolder = None,
    hook: Hook = "",
    part: Annotated[str, typer.Option(help="Rows to evaluate on: heldout, train or all.")] = "heldout",
    downstream: Annotated[
        bool, typer.Option("--downstream", help="Measure CE score and KL of the model with the SAE in it.")
    ] = False,
    downstream_rows: Annotated[str, typer.Option(help="Maximum number of rows in that measurement.")] = "16k",
    model: Annotated[
        str | None,
        typer.Option(help="With --downstream: folder or hub id of the model. (default: the one of the cache)"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the JSON to a file too.")] = None,
    device: Device = "auto",
    allow_incomplete: Incomplete = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Evaluate SAEs on rows that they were not trained on, exactly: every held-out row, in float64.

    The result is also stored beside each SAE: analysis/<key of the cache>/eval.json.
    """
    with expected_errors(debug):
        if part not in PARTS:
            raise ConfigError(f"--part is {part!r}, expected one of {', '.join(PARTS)}")
        rows = _count(downstream_rows) if downstream else None
        from sae_granary.analyze.commands.evaluation_table import show_evaluations
        from sae_granary.analyze.evaluation.downstream import Models
        from sae_granary.analyze.source import open_source
        from sae_granary.common.files import write_json
        from sae_granary.common.process import tuned_process

        models, found, failures = Models(), [], []
        with tuned_process(device):
            for sae in [sae for folder in saes for sae in _saes_in(folder)]:
                try:
                    source = open_source(
                        sae, cache, hooks=names_in(hook), device=device, allow_incomplete=allow_incomplete
                    )
                    found.append(_evaluate(source, part, rows, models, model, quiet))  # type: ignore[arg-type]
                except GranaryError as error:  # the others are told all the same
                    failures.append(error)
        if failures and not found:
            raise failures[0]
        for failure in failures:
            echo(f"error: {failure}", err=True, color="red")
        if out is not None:
            write_json(out, {"evaluations": found})
        if as_json:
            echo(json.dumps({"evaluations": found}, indent=1))
        else:
            show_evaluations(found)
        if failures:
            raise typer.Exit(2)


def _saes_in(folder: Path) -> list[Path]:
    """The SAEs of a sweep, or of another folder that holds some; else the folder itself."""
    from sae_granary.common.finished_run import SAE_RECORD

    inner = sorted(path.parent for path in folder.glob(f"*/{SAE_RECORD}"))
    return [folder] if (folder / SAE_RECORD).is_file() or not inner else inner


def _count(text: str) -> int:
    """The value of --downstream-rows."""
    try:
        count = parse_count(text)
    except ValueError as error:
        raise ConfigError(f"--downstream-rows: {error}") from None
    if count < 1:
        raise ConfigError(f"--downstream-rows is {text}, expected at least 1")
    return count


def _evaluate(
    source: Source, part: Part, downstream_rows: int | None, models: Models, model: str | None, quiet: bool
) -> dict[str, Any]:
    """The evaluation of one SAE, stored beside it; its downstream numbers are measured, or those of before are kept."""
    from sae_granary.analyze.errors import DownstreamError
    from sae_granary.analyze.evaluation.downstream import evaluate_downstream
    from sae_granary.analyze.evaluation.measure import evaluate as measure
    from sae_granary.analyze.evaluation.stored import load_evaluation, save_evaluation
    from sae_granary.analyze.progress import row_progress

    with row_progress(f"evaluating {source.folder.name}", source.cache.n_rows, quiet=quiet) as tick:
        found = measure(source, part, tick)
    before = load_evaluation(source, part)
    if before is not None and before["selection"] == found["selection"]:
        found["downstream"] = before["downstream"]
    if downstream_rows is not None:
        try:
            numbers, notes = evaluate_downstream(source, part, downstream_rows, models, model)
            found["downstream"] = numbers
            found["notes"] += notes
        except DownstreamError as error:
            if model is not None:  # asked for by name
                raise
            found["notes"].append(f"downstream skipped: {error}")
    save_evaluation(source, found)
    return found
