"""A sweep on several ranks: each trains some of the SAEs, on a stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sae_granary import __version__
from sae_granary.common.errors import ConfigError
from sae_granary.train.errors import RankError
from sae_granary.train.folders import is_sweep
from sae_granary.train.ranks.place import Place
from sae_granary.train.ranks.world import World, joined, pin_device
from sae_granary.train.sweeps.execution import SweepExecution
from sae_granary.train.sweeps.results import SweepResult, sweep_rows
from sae_granary.train.sweeps.sweep_plan import Plan, load_plan


def sweep_on_ranks(
    place: Place,
    begin: Callable[[], tuple[Plan, bool]],
    carry_out: Callable[[Plan], SweepExecution],
    folder: Path,
    given: Mapping[str, Any],
) -> SweepResult:
    """Train the SAEs without a result, divided over the ranks in the order of the plan.

    All ranks see the sweep's folder. SAEs of a rank that died stay without a result; the same command on any number of
    ranks divides what is left. Rank 0 plans, and writes the tables when all have ended.
    Raises RankError for ranks that are missing or gone, ConfigError for ranks that disagree.
    """
    with joined(place, "cpu") as world:
        world.compare({"version": __version__, "torch": torch.__version__, "ranks": place.n, **given})
        return _lead(world, *begin(), carry_out) if place.leads else _follow(world, carry_out, folder)


def _lead(world: World, plan: Plan, is_new: bool, carry_out: Callable[[Plan], SweepExecution]) -> SweepResult:
    execution, missing = carry_out(plan), None
    pin_device(world.place, plan.entries[0].config.device)
    with execution.held(fresh=is_new):
        left = execution.left()
        world.say("left", left)
        execution.train(share_of(left, world.place))
        for rank in range(1, world.place.n):
            try:
                world.hear(f"ended/{rank}")
            except RankError as error:
                missing = error
        result = execution.table()
    world.say("ended/0", True)
    if missing is not None:
        raise missing
    return result


def _follow(world: World, carry_out: Callable[[Plan], SweepExecution], folder: Path) -> SweepResult:
    world.watch(True)
    left = world.hear("left")
    world.watch(False)  # what it trains, it trains without the others
    if not is_sweep(folder):
        raise ConfigError(
            f"rank {world.place.index} does not see {folder.resolve()}, which rank 0 has made: expected a folder that "
            "all ranks share; change --runs-dir"
        )
    execution = carry_out(load_plan(folder))
    pin_device(world.place, execution.plan.entries[0].config.device)
    with execution.reported():
        execution.train(share_of(left, world.place))
    world.watch(True)
    world.say(f"ended/{world.place.index}", True)
    world.hear("ended/0")
    return SweepResult(folder, sweep_rows(execution.plan, folder))


def share_of(left: list[str], place: Place) -> list[str]:
    """The names that a rank trains: neighbors in the plan, which share a stream, stay together."""
    return left[len(left) * place.index // place.n : len(left) * (place.index + 1) // place.n]
