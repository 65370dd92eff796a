"""Callbacks: observe a run after each step, add metrics to its log, add files to its checkpoints.

A function of a StepEvent also works: `train_sae(..., callbacks=[lambda event: {"mine": 1.0}])`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_granary.sae_core import SAE, Rows
from sae_granary.train.errors import CheckpointError
from sae_granary.train.loop import StepResult

Numbers = Mapping[str, float] | None


@dataclass(frozen=True, eq=False)
class StepEvent:
    """The state of a run after a step."""

    name: str
    folder: Path
    step: int  # steps taken, this one included
    n_steps: int
    tokens: int
    sae: SAE  # as trained: look, do not change, or a resumed run will differ
    rows: Rows | None  # (B, d_in) the raw batch by hook point; None: through the language model
    result: StepResult  # losses and metrics are filled in on measured steps (`log_every`)


class Callback:
    """Base of callbacks: override the methods you need. An exception ends the run."""

    def on_step(self, event: StepEvent) -> Numbers:
        """Called after every step; returned metrics go to all sinks with the step's own."""
        return None

    def wants_checkpoint(self, event: StepEvent) -> bool:
        """Whether to write a checkpoint now, beside those of `save_every`."""
        return False

    def on_checkpoint(self, folder: Path, step: int) -> None:
        """Called after every checkpoint; files added to `folder` are part of the checkpoint and removed with it."""

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Called with the result at the end."""

    def state(self) -> Mapping[str, Any]:
        """JSON values that a resumed run passes to `restore`."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""


AnyCallback = Callback | Callable[[StepEvent], Numbers]


class _Function(Callback):
    def __init__(self, function: Callable[[StepEvent], Numbers]) -> None:
        self._function = function

    def on_step(self, event: StepEvent) -> Numbers:
        return self._function(event)


class Callbacks:
    """All callbacks of a run."""

    def __init__(self, callbacks: Sequence[AnyCallback]) -> None:
        self._all = [c if isinstance(c, Callback) else _Function(c) for c in callbacks]

    def on_step(self, event: StepEvent) -> dict[str, float]:
        """The metrics of all callbacks, as numbers."""
        out: dict[str, float] = {}
        for callback in self._all:
            out |= {name: float(value) for name, value in (callback.on_step(event) or {}).items()}
        return out

    def want_checkpoint(self, event: StepEvent) -> bool:
        """Whether any callback wants a checkpoint."""
        wanted = [callback.wants_checkpoint(event) for callback in self._all]  # each is asked
        return any(wanted)

    def on_checkpoint(self, folder: Path, step: int) -> None:
        for callback in self._all:
            callback.on_checkpoint(folder, step)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        for callback in self._all:
            callback.on_end(summary)

    def state(self) -> list[Any]:
        """The states of all callbacks, in order."""
        return [dict(callback.state()) for callback in self._all]

    def restore(self, states: Any) -> None:
        """Restore saved states. Raises CheckpointError if they are not a list, or belong to other callbacks."""
        if not isinstance(states, list):
            raise CheckpointError(f"the checkpoint's state of callbacks is {states!r:.100}, expected a list")
        if any(states) and len(states) != len(self._all):
            raise CheckpointError(
                f"the checkpoint was written with {len(states)} callbacks, now there are {len(self._all)}: "
                "give resume_training the same ones"
            )
        for callback, state in zip(self._all, states, strict=False):
            callback.restore(state)
