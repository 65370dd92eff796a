"""`sae-train sweep`, and what `run` and `resume` do with several SAEs. Heavy imports are inside the commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae_granary.common.app import Debug, Quiet, echo, fail
from sae_granary.common.errors import ConfigError
from sae_granary.train.commands.shared_flags import (
    NO_CACHE,
    DryRun,
    Overwrite,
    ReadFlags,
    Stage,
    Verify,
    errors,
    follows,
    working,
)
from sae_granary.train.config.flags import takes_settings

if TYPE_CHECKING:
    from sae_granary.train.config.flags import Given
    from sae_granary.train.sweeps.results import SweepResult
    from sae_granary.train.sweeps.sweep_plan import Plan


@takes_settings
def sweep(
    read_flags: ReadFlags,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", help="Values to combine: k=16,32,64. `seed` varies the initialization. Repeatable."),
    ] = None,
    batched: Annotated[
        bool,
        typer.Option(
            "--batched/--no-batched",
            help="Let topk SAEs of equal shape share the passes over their latents. For GPUs; equal up to rounding.",
        ),
    ] = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    verify: Verify = False,
    stage: Stage = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train one SAE per point of a grid, all on the same batches.

    `sae-train sweep --cache cache/bert_l6 --grid type=topk,batchtopk --grid k=16,32 --grid seed=0,1`, or a file with
    a `grid:` section (--config). The other flags apply to all SAEs. The same command resumes a stopped sweep.
    """
    with errors(debug, stage):
        axes, common = grid_of(read_flags(), grid or [])
        train_grid(axes, common, overwrite=overwrite, verify=verify, quiet=quiet, dry_run=dry_run, batched=batched)


def grid_of(given: Given, texts: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The grid of flags and file, and the settings that all its points share. Flags win over the file."""
    from sae_granary.common.settings.yaml_file import Settings
    from sae_granary.train.config.hook_layers import place_hooks
    from sae_granary.train.config.merge import merge_layers
    from sae_granary.train.sweeps.grid import ALIASES, parse_grid

    on_top = parse_grid(texts)
    given, each = place_hooks(given)
    fixed = {ALIASES.get(key, key) for key in given.flags}
    files = [Settings(values) for label, values in given.layers() if label != "flag"]
    axes: dict[str, Any] = {}
    for values in files:
        section = values.pop("grid", None) or {}
        if not isinstance(section, dict):
            raise ConfigError(f"grid: {section!r}: expected keys with lists of values, as in grid: {{k: [16, 32]}}")
        axes |= {key: v for key, v in section.items() if ALIASES.get(key, key) not in fixed}
        for key in [*on_top, *section]:
            values.pop(ALIASES.get(key, key), None)
    axes = {k: v for k, v in axes.items() if ALIASES.get(k, k) not in {ALIASES.get(t, t) for t in on_top}} | on_top
    common = merge_layers([*files, given.flags])
    if not common.get("cache"):
        raise ConfigError(NO_CACHE)
    if each:
        if {"hook", "layer"} & set(axes):
            raise ConfigError("--layer (or --hook) and the grid both choose hook points: keep one of them")
        axes["hook"] = each
        common.pop("hook", None)  # of the file, which flags override
    return axes, common


def several(given: Given) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The grid that a `run` means which asks for several SAEs (--layers 2,4, --init-seed 0,1); None for one."""
    from sae_granary.train.config.hook_layers import place_hooks

    seeds = str(given.flags.get("init_seed", ""))
    if not place_hooks(given)[1] and "," not in seeds:
        return None
    texts = [f"init_seed={seeds}"] if "," in seeds else []
    rest = {key: value for key, value in given.flags.items() if not texts or key != "init_seed"}
    return grid_of(replace(given, flags=rest), texts)


def train_grid(
    axes: dict[str, Any],
    common: dict[str, Any],
    *,
    overwrite: bool,
    quiet: bool,
    verify: bool = False,
    dry_run: bool = False,
    batched: bool = False,
) -> None:
    """Train a grid and print its table, or print its plan."""
    from sae_granary.train.sweeps.sweep import plan_sweep, train_sweep

    if dry_run:
        show_plan(plan_sweep(axes, common, batched=batched))
        return
    start = partial(train_sweep, axes, common, overwrite=overwrite, verify=verify, batched=batched)
    _show(start, quiet, str(common.get("device") or "auto"))


def resume_grid(folder: Path, quiet: bool, cache: Path | None, lm: str | None) -> None:
    """Continue a sweep and print its table. `cache`, `lm`: where they are, if they were moved."""
    from sae_granary.train.sweeps.sweep import resume_sweep
    from sae_granary.train.sweeps.sweep_plan import load_plan

    device = load_plan(folder).entries[0].config.device
    _show(lambda **options: resume_sweep(folder, cache=cache, lm=lm, **options), quiet, device)


def _show(start: Callable[..., SweepResult], quiet: bool, device: str) -> None:
    """Run with a console and signal handlers, then print the result; exit code 1 if an SAE has none."""
    from sae_granary.common.finished_run import read_summary
    from sae_granary.train.commands.result_tables import show_results
    from sae_granary.train.sweeps.reporter import Reporter
    from sae_granary.train.sweeps.sweep_console import SweepConsole

    reporter = Reporter() if quiet or follows() else SweepConsole()
    with working(device, reporter.message) as stop:
        result = start(reporter=reporter, stop=stop)
    if follows():
        return
    finished = [row for row in result.rows if row["status"] == "finished"]
    if finished:
        show_results([read_summary(result.folder / str(row["name"])) for row in finished])
    echo(f"{result.folder}")
    if result.failures:
        lines = [f"failed: {name}: {error}" for name, error in result.failures.items()]
        fail("\n".join([*lines, f"{len(lines)} of {len(result.rows)} SAEs have no result"]), 1)


def show_plan(plan: Plan) -> None:
    """Names, sizes and groups; nothing is written."""
    from rich.table import Table

    from sae_granary.common.quantities import byte_size
    from sae_granary.train.commands.result_tables import show
    from sae_granary.train.memory.capacity import needed_disk

    table = Table()
    for column in ("group", "run", "type", "hook", "d_sae", "steps", "batch", "lr"):
        table.add_column(column, overflow="fold", justify="left" if column in ("run", "type", "hook") else "right")
    for number, group in enumerate(plan.groups, 1):
        for entry in group.entries:
            config = entry.config
            cells = (",".join(config.hook), f"{config.options['d_sae']:,}", f"{config.steps:,}")
            table.add_row(str(number), entry.name, config.type, *cells, f"{config.batch_size:,}", f"{config.lr:.3g}")
    show(table)
    for note in plan.notes:
        echo(note)
    disk = sum(needed_disk(entry.config) for entry in plan.entries)
    runs_dir = plan.entries[0].config.runs_dir
    groups = "1 group" if len(plan.groups) == 1 else f"{len(plan.groups)} groups"
    echo(f"{len(plan.entries)} SAEs in {groups}, up to {byte_size(disk)} in {runs_dir}")
    echo("nothing was written: run without --dry-run to train")
