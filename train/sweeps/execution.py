"""Running the plan of a sweep."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from sae_granary.cache.remote.stage import stage_folder
from sae_granary.common.files import shortage
from sae_granary.common.finished_run import RECORD, is_complete, read_record
from sae_granary.common.process import open_files_left
from sae_granary.common.signals import StopRequest
from sae_granary.common.signed import write_signed
from sae_granary.train.callbacks import AnyCallback
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.data.cache_of_run import find_cache
from sae_granary.train.data.run_data import RunData
from sae_granary.train.data.stage import stage
from sae_granary.train.errors import (
    DivergedError,
    InterruptedRunError,
    RunExistsError,
    ShortageError,
    shortage_is_clear,
)
from sae_granary.train.folders import FAILURE, exclusive, is_unused
from sae_granary.train.lockstep import train_together
from sae_granary.train.memory.capacity import needed_disk
from sae_granary.train.memory.shrink import free_memory
from sae_granary.train.open_trainer import open_trainer
from sae_granary.train.sweeps.batched import Batched
from sae_granary.train.sweeps.reporter import Reporter
from sae_granary.train.sweeps.results import SweepResult, read_failure, sweep_rows, write_results
from sae_granary.train.sweeps.sweep_plan import Entry, Group, Plan, load_plan, save_plan
from sae_granary.train.trainer import Trainer

OTHER_FILES = 32  # open beside one lock per SAE: shards, a checkpoint being written, the sinks

# Makes the callbacks of one SAE from its resolved settings: they hold a state, so that no two SAEs can share them.
MakeCallbacks = Callable[[TrainConfig], Sequence[AnyCallback]]


class SweepExecution:
    """A plan, carried out in its folder: one group of SAEs after another."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        callbacks: MakeCallbacks | None,
        reporter: Reporter | None,
        stop: StopRequest | None,
        cache: str | Path | None = None,
        lm: str | None = None,
    ) -> None:
        self.cache, self.lm = cache, lm  # where they are now, if they are not where the plan says
        self.plan, self.folder, self.callbacks = plan, folder, callbacks
        self.reporter = Reporter() if reporter is None else reporter
        self.stop = StopRequest() if stop is None else stop

    def execute(self, *, fresh: bool = False) -> SweepResult:
        """Train every SAE without a result, then write the tables; a new plan is saved first."""
        with self.held(fresh=fresh):
            self.train()
            return self.table()

    @contextmanager
    def held(self, *, fresh: bool = False) -> Iterator[None]:
        """Context manager: this process has the sweep's folder; a new plan is saved first."""
        with self.reported(), exclusive(self.folder):
            if not (is_unused(self.folder) if fresh else load_plan(self.folder) == self.plan):
                raise RunExistsError(
                    f"{self.folder} was begun or replaced meanwhile by another process: run the same command again"
                )
            if fresh:
                save_plan(self.plan, self.folder)
            for note in self.plan.notes:
                self.reporter.message(note)
            yield

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Context manager: errors name the sweep; the reporter is closed at the end."""
        try:
            with shortage_is_clear(self.folder, sum(needed_disk(entry.config) for entry in self.plan.entries)):
                yield
        except InterruptedRunError as error:
            raise InterruptedRunError(error.signum, error.step, self.folder) from None
        finally:
            self.reporter.close()

    def left(self) -> list[str]:
        """Names of the SAEs without a result."""
        return [entry.name for entry in self.plan.entries if not is_complete(self.folder / entry.name)]

    def train(self, only: Collection[str] | None = None) -> None:
        """Train the SAEs without a result; `only` those of these names."""
        self._stage(only)
        for group in self.plan.groups:
            self._train(group, only)

    def _stage(self, only: Collection[str] | None) -> None:
        """Copy what all SAEs without a result read (`--stage`), before one of them begins."""
        left = [name for name in self.left() if only is None or name in only] if stage_folder() else []
        runs = [
            RunData.reopen(replace(entry.config, cache=self._cache_of(group)), group.record)
            for group in self.plan.groups
            for entry in group.entries
            if entry.name in left
        ]
        if runs:
            stage(*runs)

    def table(self) -> SweepResult:
        """Write the tables."""
        rows = sweep_rows(self.plan, self.folder)
        write_results(rows, self.folder)
        return SweepResult(self.folder, rows)

    def _train(self, group: Group, only: Collection[str] | None) -> None:
        """Train the rest of a group."""
        left = []
        for entry in group.entries:
            if only is not None and entry.name not in only:
                continue
            if is_complete(self.folder / entry.name):
                self.reporter.ended(entry.name, "was complete")
            elif (failure := read_failure(self.folder / entry.name)) and failure.get("final"):
                self.reporter.ended(entry.name, f"failed: {failure['error']}")
            else:
                left.append(entry)
        if not left:
            return
        cache = self._cache_of(group)
        left = [replace(e, config=replace(e.config, cache=cache, lm=self.lm or e.config.lm)) for e in left]
        self.reporter.start(self.plan, group)
        most = self._most_at_once(left)
        for first in range(0, len(left), most):
            with ExitStack() as stack:
                trainers = self._open(left[first : first + most], group, stack)
                prepare = {"prepare": Batched()} if self.plan.batched else {}
                for trainer in train_together(trainers, self.stop, self._fail, **prepare):
                    self.reporter.ended(trainer.folder.name, "complete")
            del trainers
        free_memory(left[0].config.device)  # the next group may need larger blocks

    def _cache_of(self, group: Group) -> str:
        """Location of a group's cache; sweeps of older versions record the fingerprint in their runs only."""
        config = group.entries[0].config
        stored, by_shard = config.cache, config.shuffle_shards is not None
        begun = [self.folder / entry.name for entry in group.entries if (self.folder / entry.name / RECORD).is_file()]
        if "cache" in group.record or not begun:
            return find_cache(stored, group.record, self.folder, self.cache, by_shard=by_shard)
        return find_cache(stored, read_record(begun[0]), begun[0], self.cache, by_shard=by_shard)

    def _most_at_once(self, left: Sequence[Entry]) -> int:
        """How many SAEs may train together by the limit of open files. Raises ShortageError if not one."""
        free = open_files_left()
        if free is None:
            return len(left)
        most = free - OTHER_FILES
        if most < 1:
            needed = f"about {OTHER_FILES + len(left)} open files needed, {max(free, 0)} free"
            raise ShortageError(f"{self.folder}: {needed}: raise the limit (ulimit -n), then run the same again")
        if most < len(left):
            self.reporter.message(f"{most} of {len(left)} SAEs train at once: the limit of open files (ulimit -n)")
        return most

    def _open(self, entries: Sequence[Entry], group: Group, stack: ExitStack) -> list[Trainer]:
        """The runs of some entries, from their checkpoints or at their start."""
        trainers, opened = [], None
        for entry in entries:
            InterruptedRunError.raise_if(self.stop, 0, self.folder)
            folder = self.folder / entry.name
            try:
                folder.mkdir(exist_ok=True)
                stack.enter_context(exclusive(folder))
                (folder / FAILURE).unlink(missing_ok=True)
                data = RunData.reopen(entry.config, group.record, opened)
                opened = data.cache
                callbacks = () if self.callbacks is None else self.callbacks(entry.config)
                trainers.append(open_trainer(data, folder, self.reporter.sinks(entry), callbacks, stack))
            except Exception as error:
                self._report(folder, error, 0)
        return trainers

    def _fail(self, trainer: Trainer, error: Exception) -> None:
        self._report(trainer.folder, error, trainer.step)

    def _report(self, folder: Path, error: Exception, step: int) -> None:
        """Leave a note of a failure that the others do not share."""
        entry = next(entry for entry in self.plan.entries if entry.name == folder.name)
        short = shortage(error, folder, needed_disk(entry.config)) if isinstance(error, OSError) else None
        text = short or " ".join(str(error).split()) or repr(error)
        failure = {"error": text, "type": type(error).__name__, "step": step}
        with contextlib.suppress(OSError):  # a full disk has no room for this either
            write_signed(folder / FAILURE, {**failure, "final": isinstance(error, DivergedError)})
        self.reporter.ended(folder.name, f"failed: {text}")
