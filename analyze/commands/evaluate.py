"""`sae-analyze eval`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from sae_granary.analyze.commands.options import takes_options
from sae_granary.analyze.commands.shared import source_of, working
from sae_granary.analyze.settings import Eval
from sae_granary.common.app import Debug, Quiet, echo, expected_errors
from sae_granary.common.errors import GranaryError

if TYPE_CHECKING:
    from sae_granary.analyze.evaluation.downstream import Models
    from sae_granary.analyze.source import Source
    from sae_granary.cache.load.selection import Part


@takes_options(Eval)
def evaluate(
    read_options: Callable[[], Eval],
    saes: Annotated[
        list[Path], typer.Argument(help="Folders of runs, or of any SAEs that can be loaded.", metavar="SAE...")
    ],
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Evaluate SAEs on rows that they were not trained on, exactly: every held-out row, in float64.

    The result is also stored beside each SAE: analysis/<key of the cache>/eval.json.
    """
    with expected_errors(debug):
        options = read_options()
        from sae_granary.analyze.commands.evaluation_table import show_evaluations
        from sae_granary.analyze.evaluation.downstream import Models
        from sae_granary.common.files import write_json

        models, found, failures = Models(), [], []
        with working(options):
            for sae in [sae for folder in saes for sae in _saes_in(folder)]:
                try:
                    found.append(_evaluate(source_of(sae, options), options, models, quiet))
                except GranaryError as error:  # the others are told all the same
                    failures.append(error)
        if failures and not found:
            raise failures[0]
        for failure in failures:
            echo(f"error: {failure}", err=True, color="red")
        if options.out is not None:
            write_json(options.out, {"evaluations": found})
        if options.json:
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


def _evaluate(source: Source, options: Eval, models: Models, quiet: bool) -> dict[str, Any]:
    """The evaluation of one SAE, stored beside it; its downstream numbers are measured, or those of before are kept."""
    from sae_granary.analyze.errors import DownstreamError
    from sae_granary.analyze.evaluation.downstream import evaluate_downstream
    from sae_granary.analyze.evaluation.measure import evaluate as measure
    from sae_granary.analyze.evaluation.stored import load_evaluation, save_evaluation
    from sae_granary.analyze.progress import row_progress

    part = cast("Part", options.part)
    with row_progress(f"evaluating {source.folder.name}", source.cache.n_rows, quiet=quiet) as tick:
        found = measure(source, part, tick)
    before = load_evaluation(source, part)
    if before is not None and before["selection"] == found["selection"]:
        found["downstream"] = before["downstream"]
    if options.downstream:
        try:
            numbers, notes = evaluate_downstream(source, part, options.downstream_rows, models, options.model)
            found["downstream"] = numbers
            found["notes"] += notes
        except DownstreamError as error:
            if options.model is not None:  # asked for by name
                raise
            found["notes"].append(f"downstream skipped: {error}")
    save_evaluation(source, found)
    return found
