"""Many SAEs from one stream of batches, in one process: each is a run like any other, in a folder of the sweep.

runs/<sweep>/
    sweep.json               the plan: members, groups, pinned shards
    <member>/                an ordinary run; failure.json if something stopped it
    results.csv .md .json    one row per SAE, written when all have ended
    pareto.png               L0 against FVU
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sae_granary.cache.remote.stage import stage_folder
from sae_granary.common.errors import ConfigError
from sae_granary.common.settings.yaml_file import Settings
from sae_granary.common.signals import StopRequest
from sae_granary.train.config.phases import needs_language_model
from sae_granary.train.data.language import check_language_model
from sae_granary.train.data.run_data import RunData
from sae_granary.train.data.stage import stage
from sae_granary.train.data.verify import verify_files
from sae_granary.train.errors import RunExistsError
from sae_granary.train.folders import check_name, claim_sweep_folder, is_sweep
from sae_granary.train.ranks.place import place_of_process
from sae_granary.train.sweeps.execution import MakeCallbacks, SweepExecution
from sae_granary.train.sweeps.grid import Point, check_grid, expand
from sae_granary.train.sweeps.grid_to_plan import default_sweep_name, make_plan, request_of
from sae_granary.train.sweeps.reporter import Reporter
from sae_granary.train.sweeps.results import SweepResult
from sae_granary.train.sweeps.sweep_plan import Plan, load_plan


@dataclass(frozen=True)
class _Request:
    """What was asked for, checked as far as that goes without opening the cache."""

    points: Sequence[Point]
    hash: str
    folder: Path
    batched: bool = False

    @classmethod
    def of(cls, grid: Mapping[str, Any], settings: Mapping[str, Any], *, batched: bool = False) -> _Request:
        common = Settings(settings).only(settings.keys() - {"name", "runs_dir"})
        points = expand(check_grid(grid), common)
        request = request_of(points)
        name = settings.get("name") or default_sweep_name(points, request)
        folder = Path(settings.get("runs_dir") or "runs") / check_name(str(name))
        return cls(points, f"{request}-batched" if batched else request, folder, batched)

    def plan(self) -> Plan:
        return make_plan(self.points, self.folder, self.hash, batched=self.batched)


def plan_sweep(
    grid: Mapping[str, Any], settings: Mapping[str, Any] | None = None, *, batched: bool = False, **more: Any
) -> Plan:
    """What `train_sweep` would do; writes nothing. Raises ConfigError, CacheError, SAEError."""
    return _Request.of(grid, Settings(settings or {}, more), batched=batched).plan()


def train_sweep(
    grid: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    *,
    callbacks: MakeCallbacks | None = None,
    overwrite: bool = False,
    verify: bool = False,
    batched: bool = False,
    reporter: Reporter | None = None,
    stop: StopRequest | None = None,
    **more: Any,
) -> SweepResult:
    """Train an SAE per point of a grid: `train_sweep({"k": [16, 32]}, cache="cache/bert_l6", type="topk")`.

    Settings are those of `train_sae`, for all points; `seed` in a grid is the initialization's. Called again with the
    same settings it continues: complete SAEs are kept, the others resume from their checkpoints. Other
    settings under the same name are refused. With `verify` the checksums of all files that are read are checked first.
    `callbacks` makes those of each SAE: `callbacks=lambda config: [Mine()]`. With `batched`, topk SAEs of equal shape
    share the passes over their latents: equal up to rounding, and meant for GPUs.

    >>> from sae_granary import train_sweep
    >>> common = {"type": "topk", "d_sae": 768, "steps": 4, "batch_size": 256, "device": "cpu", "name": "ks"}
    >>> sweep = train_sweep({"k": [8, 16]}, cache="cache/demo_l3", **common)
    >>> [(row["k"], row["type"]) for row in sweep.rows], sweep.failures
    ([(8, 'topk'), (16, 'topk')], {})

    Raises ConfigError, CacheError or SAEError before anything is written, RunExistsError for other settings.
    """
    _check_callbacks(callbacks)
    request = _Request.of(grid, Settings(settings or {}, more), batched=batched)
    begin = partial(_begin, request, overwrite=overwrite, verify=verify)
    carry_out = partial(SweepExecution, folder=request.folder, callbacks=callbacks, reporter=reporter, stop=stop)
    return _execute(begin, carry_out, request.folder, {"request": request.hash})


def check_request(grid: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Check a grid as far as that goes without opening the cache. Raises ConfigError, SAEError."""
    _Request.of(grid, settings)


def _begin(request: _Request, *, overwrite: bool, verify: bool) -> tuple[Plan, bool]:
    """The plan of a new sweep, or of the one that is there, and whether it is new."""
    folder = request.folder
    if is_sweep(folder) and not overwrite:
        plan = load_plan(folder)
        if plan.request != request.hash:
            raise RunExistsError(
                f"{folder} holds a sweep with other settings: choose another --name, continue that one with "
                f"sae-train resume {folder}, or replace it with --overwrite"
            )
        _check(plan, verify=verify)
        return plan, False
    plan = request.plan()
    _check_language_models(plan)
    _check(plan, verify=verify)
    claim_sweep_folder(folder, overwrite=overwrite, starts=[entry.config.init_from for entry in plan.entries])
    return plan, True


def _execute(
    begin: Callable[[], tuple[Plan, bool]],
    carry_out: Callable[[Plan], SweepExecution],
    folder: Path,
    given: Mapping[str, Any],
) -> SweepResult:
    """Carry out a plan, on all ranks if torchrun started several."""
    if (place := place_of_process()) is not None:
        from sae_granary.train.ranks.sweep import sweep_on_ranks  # torch.distributed

        return sweep_on_ranks(place, begin, carry_out, folder, given)
    plan, is_new = begin()
    return carry_out(plan).execute(fresh=is_new)


def resume_sweep(
    folder: str | Path,
    *,
    cache: str | Path | None = None,
    lm: str | None = None,
    callbacks: MakeCallbacks | None = None,
    reporter: Reporter | None = None,
    stop: StopRequest | None = None,
) -> SweepResult:
    """Continue a sweep by its saved plan; every SAE ends bitwise as if nothing had stopped it.

    One that diverged is not tried again (it would diverge again), any other failure is. `callbacks`: as before.
    `cache` and `lm` (the language model): where they are now, if they were moved.

    >>> from sae_granary import resume_sweep
    >>> len(resume_sweep("runs/demo_sweep").rows)
    2
    """
    _check_callbacks(callbacks)
    folder = Path(folder)
    given = {"folder": folder, "cache": cache, "lm": lm}
    carry_out = partial(
        SweepExecution, folder=folder, callbacks=callbacks, reporter=reporter, stop=stop, cache=cache, lm=lm
    )
    return _execute(lambda: (load_plan(folder), False), carry_out, folder, given)


def _check(plan: Plan, *, verify: bool) -> None:
    """Check the space for copies of what is read, and its checksums."""
    if not (verify or stage_folder() or any(entry.config.shuffle_shards for entry in plan.entries)):
        return
    runs = [RunData.reopen(entry.config, group.record) for group in plan.groups for entry in group.entries]
    stage(*runs, copy=False)
    if verify:
        verify_files(runs)


def _check_callbacks(callbacks: Any) -> None:
    if callbacks is not None and not callable(callbacks):
        raise ConfigError(
            f"callbacks of a sweep are {type(callbacks).__name__}, expected a function that makes those of each SAE "
            "from its settings: callbacks=lambda config: [...]"
        )


def _check_language_models(plan: Plan) -> None:
    """Load what the SAEs go through, so that a model that is missing is told before anything is spent."""
    for group in plan.groups:
        wanted = {e.config.hook: e.config for e in group.entries if needs_language_model(e.config)}
        # Held together, so that a model which several hook points share is loaded once.
        opened = [RunData.reopen(config, group.record) for config in wanted.values()]
        for data in opened:
            check_language_model(data)
