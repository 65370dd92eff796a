"""`sae-harvest run | plan | config | names`: text to activations on disk. Heavy imports are inside the commands."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae_granary.common.app import Debug, Quiet, echo, expected_errors, make_app
from sae_granary.harvest.settings.flags import ReadFlags, takes_model_flags, takes_settings

if TYPE_CHECKING:
    from sae_granary.harvest.plan import Plan

RecordUser = Annotated[bool, typer.Option("--record-user", help="Write your user name into the cache's about.json.")]

app = make_app("sae-harvest", "Stream text through a transformer and keep its activations in a cache on disk.")

ProbeTime = Annotated[
    str | None,
    typer.Option("--probe", help="Load the model and measure its throughput on the first texts for this long: 30s."),
]

_LAYER = "Block whose output is added, counted from 0: 8, or 2,4,8, or all."
_HOOK = "Module by path or glob; append :in for its input; see `sae-harvest names`."
_TRUNCATED = (
    "error: a file of the text or the model was truncated while it was read, or its disk fails; restore the file "
    "and run the same command again: committed work is safe"
)


@app.command()
@takes_settings
def run(read_flags: ReadFlags, record_user: RecordUser = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Harvest a cache, or continue one that was interrupted."""
    with _errors(debug):
        from sae_granary.cache.write.about import add_user
        from sae_granary.common.process import keep_freed_memory
        from sae_granary.common.signals import explain_bus_errors, stop_on_signals
        from sae_granary.harvest.progress import print_table, summary_rows
        from sae_granary.harvest.ranks.world import World
        from sae_granary.harvest.run import harvest_activations
        from sae_granary.harvest.settings.make import make_config, merged

        config = make_config(merged(read_flags()))
        if config.model.trust_remote_code:
            typer.secho(f"running the code that comes with {config.model.model}", fg="yellow", err=True)
        explain_bus_errors(lambda: _TRUNCATED)
        with stop_on_signals(at_once=True, second="exit") as stop:
            keep_freed_memory(config.model.device)
            with World.of_environment().named():
                result = harvest_activations(config, quiet=quiet, stop=stop)
        if not World.of_environment().tells:  # another rank prints for all
            return
        if record_user and not result.already_complete:
            add_user(result.path)
        unknown = f" ({result.not_recorded} not recorded)" if result.not_recorded else ""
        title = f"already complete{unknown}, nothing to do" if result.already_complete else "harvested"
        print_table(summary_rows(result), title)


@app.command()
@takes_settings
def plan(read_flags: ReadFlags, probe: ProbeTime = None, debug: Debug = False) -> None:
    """Estimate rows, disk and time of `run` with the same flags; loads no weights, writes nothing.

    With --extend it tells what comes to the rows that are there. Exits with 1 if the disk has too little room.
    """
    with _errors(debug):
        from sae_granary.harvest.replay.growth import plan_growth
        from sae_granary.harvest.settings.make import make_config, merged

        _show_plan(lambda say: plan_growth(make_config(merged(read_flags())), say), probe)


def _show_plan(make: Callable[[Callable[[str], None]], Plan], probe_time: str | None) -> None:
    """Print a plan, with the throughput measured for so long. Exits with 1 if the disk has too little room."""
    from sae_granary.harvest import plan as planning
    from sae_granary.harvest import probe as probing
    from sae_granary.harvest.progress import Progress, print_table

    seconds = None if probe_time is None else probing.parse_seconds(probe_time)
    result, words = make(lambda message: echo(message, err=True)), ""
    if seconds is not None:
        with Progress(result.prepared.unit, None) as progress:
            measured = probing.probe(result.prepared, seconds, progress)
        words = measured.words(result.n_rows)
    print_table(planning.plan_rows(result, words), "plan" if result.fits else "plan: it does NOT fit")
    if not result.fits:
        raise typer.Exit(1)


@app.command()
@takes_settings
def config(read_flags: ReadFlags, debug: Debug = False) -> None:
    """Print the settings that `run` with the same flags would use, each with where it comes from; nothing is written.

    What follows from the model and the text is decided too, without loading weights. The output is a file for --config.
    """
    with _errors(debug):
        from sae_granary.harvest.settings.show import annotated_yaml

        echo(annotated_yaml(read_flags(), lambda message: echo(message, err=True)), nl=False)


@app.command()
def add(
    to: Annotated[Path, typer.Option("--to", help="The complete cache whose rows get more hook points.")],
    layers: Annotated[list[str] | None, typer.Option("--layer", "--layers", "-l", help=_LAYER)] = None,
    hooks: Annotated[list[str] | None, typer.Option("--hook", help=_HOOK)] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="New place of the model, if it was moved.")] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", "-d", help="New place of the text, if moved.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Another GPU: cuda:1 after a harvest on cuda.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show rows, disk and time; write nothing.")] = False,
    probe: ProbeTime = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Add hook points to a complete cache, on the same rows: its text and its model once more, compared row by row."""
    with _errors(debug):
        from sae_granary.common.process import keep_freed_memory
        from sae_granary.common.signals import explain_bus_errors, stop_on_signals
        from sae_granary.harvest.progress import print_table, summary_rows
        from sae_granary.harvest.replay.add import add_hooks, prepare_addition
        from sae_granary.models.config import WhereConfig, parse_layers

        where = WhereConfig(layers=parse_layers(layers or []), hooks=tuple(hooks or ()))
        if plan or probe is not None:
            from sae_granary.harvest.replay.growth import plan_addition

            places = {"model": model, "dataset": dataset, "device": device}
            _show_plan(lambda say: plan_addition(*prepare_addition(to, where, places, say)), probe)
            return
        explain_bus_errors(lambda: _TRUNCATED)
        with stop_on_signals(at_once=True, second="exit") as stop:
            keep_freed_memory(device or "auto")
            result = add_hooks(to, where, model=model, dataset=dataset, device=device, quiet=quiet, stop=stop)
        print_table(summary_rows(result), "already there, nothing to do" if result.already_complete else "added")


@app.command()
def repair(
    cache: Annotated[Path, typer.Argument(help="A complete cache.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the damaged files.")] = False,
    model: Annotated[str | None, typer.Option("--model", "-m", help="New place of the model, if it was moved.")] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", "-d", help="New place of the text, if moved.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Another GPU: cuda:1 after a harvest on cuda.")] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Restore the damaged files of a cache: harvest their rows again, which must give the recorded bytes."""
    with _errors(debug):
        from sae_granary.common.process import keep_freed_memory
        from sae_granary.common.signals import stop_on_signals
        from sae_granary.harvest.replay.damage import find_damage, report_lines
        from sae_granary.harvest.replay.repair import repair as restore

        if dry_run:
            damages = find_damage(cache)
        else:
            with stop_on_signals(at_once=True, second="exit") as stop:
                keep_freed_memory(device or "auto")
                damages = restore(cache, model=model, dataset=dataset, device=device, quiet=quiet, stop=stop)
        for line in report_lines(damages, restored=not dry_run):
            echo(line)
        if damages and dry_run:
            raise typer.Exit(1)


@app.command()
def script(
    context: typer.Context,
    command: Annotated[list[str], typer.Argument(help="What to harvest, after --: run, with all flags.")],
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Jobs of the array.")] = 8,
    gpus: Annotated[int, typer.Option("--gpus", min=0, max=1, help="GPUs of each job.")] = 1,
    time: Annotated[str, typer.Option("--time", help="Time limit of a job, as SLURM writes it.")] = "04:00:00",
    debug: Debug = False,
) -> None:
    """Print an sbatch file for SLURM: an array of jobs that harvest one cache together."""
    with _errors(debug):
        from sae_granary.common.settings.sbatch import parsed
        from sae_granary.harvest.ranks.slurm import sbatch_script
        from sae_granary.harvest.settings.flags import given_settings
        from sae_granary.harvest.settings.make import make_config, merged

        flags = parsed(context, command, "sae-harvest", ("run",))
        given = {name: value for name, value in flags.items() if name in inspect.signature(given_settings).parameters}
        make_config(merged(given_settings(**given)))
        echo(sbatch_script(command[1:], jobs=jobs, gpus=gpus, time=time), nl=False)


@app.command()
@takes_model_flags
def names(
    read_flags: Callable[[], dict[str, Any]],
    model: Annotated[str, typer.Argument(help="Hub id, local folder, or demo.")],
    debug: Debug = False,
) -> None:
    """List what can be harvested from a model: layers, and module paths for --hook with their widths."""
    with _errors(debug):
        from sae_granary.harvest.settings.names import name_lines
        from sae_granary.models.config import ModelConfig

        for line in name_lines(ModelConfig(model, **read_flags())):
            echo(line)


def _errors(debug: bool) -> AbstractContextManager[None]:
    """The errors of all harvest commands, in one red line."""
    return expected_errors(
        debug,
        interrupted="interrupted: run the same command again to continue after the last committed shard, if any",
        remedy="fix this and run the command again, --debug shows where it happened",
    )


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    sys.exit(app())
