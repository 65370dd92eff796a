"""Many SAEs from one stream of batches, in one process: each is a run like any other, in a folder of the sweep.

runs/<sweep>/
    sweep.json               the plan: members, groups, pinned shards
    <member>/                an ordinary run; failure.json if something stopped it
    results.csv .md .json    one row per SAE, written when all have ended
    pareto.png               L0 against FVU
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sae_granary.common import run_files as files
from sae_granary.common.signals import StopRequest
from sae_granary.sae_core import Rows
from sae_granary.train.callbacks import AnyCallback, Callbacks
from sae_granary.train.config.phases import needs_language_model
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.data.run_data import RunData
from sae_granary.train.errors import ConfigError, DivergedError, InterruptedRunError, RunExistsError
from sae_granary.train.folders import FAILURE, check_name, claim_sweep_folder, exclusive, is_complete, is_sweep
from sae_granary.train.lockstep import train_together
from sae_granary.train.run import all_sinks
from sae_granary.train.sinks.sink import Sink, Sinks
from sae_granary.train.sweeps.grid import Point, check_grid, expand
from sae_granary.train.sweeps.grid_to_plan import default_sweep_name, make_plan, request_of
from sae_granary.train.sweeps.results import Row, read_failure, sweep_rows, write_results
from sae_granary.train.sweeps.sweep_plan import Entry, Group, Plan, load_plan, save_plan
from sae_granary.train.trainer import Trainer, open_trainer

# Makes the callbacks of one SAE from its resolved settings: they hold a state, so that no two SAEs can share them.
MakeCallbacks = Callable[[TrainConfig], Sequence[AnyCallback]]


class Reporter:
    """What a sweep tells while it runs; this one says nothing."""

    def start(self, plan: Plan, group: Group) -> None:
        """A group starts."""

    def sinks(self, entry: Entry) -> Sequence[Sink]:
        """Sinks of one SAE, beside its own files."""
        return ()

    def ended(self, name: str, how: str) -> None:
        """An SAE is complete, was so already, or failed."""

    def message(self, text: str) -> None:
        """Something a person should know."""

    def close(self) -> None:
        """Release what is held, also after an error."""


@dataclass(frozen=True)
class SweepResult:
    """The folder of a sweep and its table: one row per SAE."""

    folder: Path
    rows: Sequence[Row]

    @property
    def failures(self) -> dict[str, str]:
        """Name -> error of those that have no result."""
        return {str(row["name"]): str(row["error"]) for row in self.rows if row.get("error")}


@dataclass(frozen=True)
class _Request:
    """What was asked for, checked as far as that goes without opening the cache."""

    points: Sequence[Point]
    hash: str
    folder: Path

    @classmethod
    def of(cls, grid: Mapping[str, Any], settings: Mapping[str, Any]) -> _Request:
        common = {key: value for key, value in settings.items() if key not in ("name", "runs_dir")}
        points = expand(check_grid(grid), common)
        request = request_of(points)
        name = settings.get("name") or default_sweep_name(points, request)
        return cls(points, request, Path(settings.get("runs_dir") or "runs") / check_name(str(name)))

    def plan(self) -> Plan:
        return make_plan(self.points, self.folder, self.hash)


def plan_sweep(grid: Mapping[str, Any], settings: Mapping[str, Any] | None = None, **more: Any) -> Plan:
    """What `train_sweep` would do; writes nothing. Raises ConfigError, CacheError, SAEError."""
    return _Request.of(grid, {**(settings or {}), **more}).plan()


def train_sweep(
    grid: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    *,
    callbacks: MakeCallbacks | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    stop: StopRequest | None = None,
    **more: Any,
) -> SweepResult:
    """Train an SAE per point of a grid: `train_sweep({"k": [16, 32]}, cache="cache/bert_l6", type="topk")`.

    Settings are those of `train_sae`, for all points; `seed` in a grid is the initialisation's. Called again with the
    same settings it continues: what is finished is left alone, what was stopped goes on from its checkpoint. Other
    settings under the same name are refused. `callbacks` makes those of each SAE: `callbacks=lambda config: [Mine()]`.

    >>> from sae_granary import train_sweep
    >>> common = {"type": "topk", "d_sae": 768, "steps": 4, "batch_size": 256, "device": "cpu", "name": "ks"}
    >>> sweep = train_sweep({"k": [8, 16]}, cache="cache/demo_l3", **common)
    >>> [(row["k"], row["type"]) for row in sweep.rows], sweep.failures
    ([(8, 'topk'), (16, 'topk')], {})
    """
    _check_callbacks(callbacks)
    request = _Request.of(grid, {**(settings or {}), **more})
    folder = request.folder
    if is_sweep(folder) and not overwrite:
        if load_plan(folder).request != request.hash:
            raise RunExistsError(
                f"{folder} holds a sweep with other settings: choose another --name, continue that one with "
                f"sae-train resume {folder}, or replace it with --overwrite"
            )
        return resume_sweep(folder, callbacks=callbacks, reporter=reporter, stop=stop)
    plan = request.plan()
    _check_language_models(plan)
    claim_sweep_folder(folder, overwrite=overwrite, starts=[entry.config.init_from for entry in plan.entries])
    return _Sweep(plan, folder, callbacks, reporter, stop).execute(fresh=True)


def resume_sweep(
    folder: str | Path,
    *,
    callbacks: MakeCallbacks | None = None,
    reporter: Reporter | None = None,
    stop: StopRequest | None = None,
) -> SweepResult:
    """Continue a sweep by its saved plan; every SAE ends bitwise as if nothing had stopped it.

    One that diverged is not tried again (it would diverge again), any other failure is. `callbacks`: as before.

    >>> from sae_granary import resume_sweep
    >>> len(resume_sweep("runs/demo_sweep").rows)
    2
    """
    _check_callbacks(callbacks)
    folder = Path(folder)
    return _Sweep(load_plan(folder), folder, callbacks, reporter, stop).execute()


def _check_callbacks(callbacks: Any) -> None:
    if callbacks is not None and not callable(callbacks):
        raise ConfigError(
            f"callbacks of a sweep are {type(callbacks).__name__}, expected a function that makes those of each SAE "
            "from its settings: callbacks=lambda config: [...]"
        )


class _Sweep:
    def __init__(
        self,
        plan: Plan,
        folder: Path,
        callbacks: MakeCallbacks | None,
        reporter: Reporter | None,
        stop: StopRequest | None,
    ) -> None:
        self.plan, self.folder, self.callbacks = plan, folder, callbacks
        self.reporter = Reporter() if reporter is None else reporter
        self.stop = StopRequest() if stop is None else stop

    def execute(self, *, fresh: bool = False) -> SweepResult:
        try:
            with exclusive(self.folder):
                if fresh:
                    save_plan(self.plan, self.folder)
                for note in self.plan.notes:
                    self.reporter.message(note)
                for group in self.plan.groups:
                    self._train(group)
                rows = sweep_rows(self.plan, self.folder)
                write_results(rows, self.folder)
        except InterruptedRunError as error:
            raise InterruptedRunError(error.signum, error.step, self.folder) from None
        finally:
            self.reporter.close()
        return SweepResult(self.folder, rows)

    def _train(self, group: Group) -> None:
        """Train what is left of a group."""
        left = []
        for entry in group.entries:
            if is_complete(self.folder / entry.name):
                self.reporter.ended(entry.name, "was complete")
            elif (failure := read_failure(self.folder / entry.name)) and failure.get("final"):
                self.reporter.ended(entry.name, f"failed: {failure['error']}")
            else:
                left.append(entry)
        if not left:
            return
        self.reporter.start(self.plan, group)
        with ExitStack() as stack:
            members = self._open(left, group, stack)
            for member in train_together(members, self.stop, self._fail):
                self.reporter.ended(member.folder.name, "complete")
        del members
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the next group may need larger blocks

    def _open(self, entries: Sequence[Entry], group: Group, stack: ExitStack) -> list[Trainer]:
        """The runs of some entries, from their checkpoints or at their start."""
        members = []
        sample = _OneSample()
        for entry in sorted(entries, key=lambda e: e.config.hook):  # those that start from one sample in a row
            InterruptedRunError.raise_if(self.stop, 0, self.folder)
            folder = self.folder / entry.name
            try:
                folder.mkdir(exist_ok=True)
                stack.enter_context(exclusive(folder))
                (folder / FAILURE).unlink(missing_ok=True)
                data = RunData.reopen(entry.config, group.record)
                sinks, callbacks = self._sinks(entry, folder, stack), self._callbacks(entry)
                members.append(open_trainer(data, folder, sinks, sample, callbacks))
            except Exception as error:
                self._report(folder, error, 0)
        return members

    def _sinks(self, entry: Entry, folder: Path, stack: ExitStack) -> Callable[[str], Sinks]:
        def make(wandb_id: str) -> Sinks:
            sinks = all_sinks(entry.config, folder, wandb_id, self.reporter.sinks(entry))
            stack.callback(sinks.close)
            return sinks

        return make

    def _callbacks(self, entry: Entry) -> Callbacks:
        return Callbacks() if self.callbacks is None else Callbacks(self.callbacks(entry.config))

    def _fail(self, member: Trainer, error: Exception) -> None:
        self._report(member.folder, error, member.step)

    def _report(self, folder: Path, error: Exception, step: int) -> None:
        """Leave a note of a failure that the others do not share."""
        text = " ".join(str(error).split()) or repr(error)
        failure = {"error": text, "type": type(error).__name__, "step": step}
        files.write_json(folder / FAILURE, {**failure, "final": isinstance(error, DivergedError)})
        self.reporter.ended(folder.name, f"failed: {text}")


def _check_language_models(plan: Plan) -> None:
    """Load what the SAEs go through, so that a model that is missing is told before anything is spent."""
    for group in plan.groups:
        wanted = {e.config.hook: e.config for e in group.entries if needs_language_model(e.config)}
        # Held together, so that a model which several hook points share is loaded once.
        opened = [RunData.reopen(config, group.record) for config in wanted.values()]
        for data in opened:
            data.check_language_model()


class _OneSample:
    """The newest sample of training rows, for SAEs that start from the same."""

    def __init__(self) -> None:
        self._key: Any = None
        self._rows: Rows | None = None

    def __call__(self, data: RunData) -> Rows:
        key = (data.stream_key, data.config.hook)
        if self._rows is None or key != self._key:
            self._key, self._rows = key, data.sample()
        return self._rows
