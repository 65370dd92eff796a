"""Callbacks: look at a run after each step, add metrics to its log, add to its checkpoints.

A plain function of a StepEvent is a callback too: `train_sae(..., callbacks=[lambda event: {"mine": 1.0}])`.
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
    """A run right after a step."""

    name: str
    folder: Path
    step: int  # steps taken, this one included
    n_steps: int
    tokens: int
    sae: SAE  # as trained: look, do not change, or a resumed run will differ
    rows: Rows | None  # (B, d_in) the raw batch by hook point; None: through the language model
    result: StepResult  # losses and metrics are filled in on measured steps (`log_every`)


class Callback:
    """Base of callbacks: override what matters. An exception ends the run."""

    def on_step(self, event: StepEvent) -> Numbers:
        """Follow every step; what is returned goes to all sinks with the step's metrics."""
        return None

    def wants_checkpoint(self, event: StepEvent) -> bool:
        """Whether to write a checkpoint now, beside those of `save_every`."""
        return False

    def on_checkpoint(self, folder: Path, step: int) -> None:
        """Follow every checkpoint, when it is complete; files added to `folder` are removed together with it."""

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Follow the result."""

    def state(self) -> Mapping[str, Any]:
        """What a resume must restore, as JSON values."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""


AnyCallback = Callback | Callable[[StepEvent], Numbers]


class _Function(Callback):
    """A plain function."""

    def __init__(self, function: Callable[[StepEvent], Numbers]) -> None:
        self._function = function

    def on_step(self, event: StepEvent) -> Numbers:
        """Call it."""
        return self._function(event)


class Callbacks:
    """All callbacks of a run."""

    def __init__(self, callbacks: Sequence[AnyCallback] = ()) -> None:
        self._all = [c if isinstance(c, Callback) else _Function(c) for c in callbacks]

    def __bool__(self) -> bool:
        return bool(self._all)

    def on_step(self, event: StepEvent) -> dict[str, float]:
        """The metrics of all, as numbers."""
        out: dict[str, float] = {}
        for callback in self._all:
            out |= {name: float(value) for name, value in (callback.on_step(event) or {}).items()}
        return out

    def want_checkpoint(self, event: StepEvent) -> bool:
        """Whether any does."""
        wanted = [callback.wants_checkpoint(event) for callback in self._all]  # each is asked
        return any(wanted)

    def on_checkpoint(self, folder: Path, step: int) -> None:
        """See `Callback`."""
        for callback in self._all:
            callback.on_checkpoint(folder, step)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """See `Callback`."""
        for callback in self._all:
            callback.on_end(summary)

    def state(self) -> list[Any]:
        """Of all, in their order."""
        return [dict(callback.state()) for callback in self._all]

    def restore(self, states: Any) -> None:
        """Raises CheckpointError if what was saved is no list, or belongs to other callbacks than these."""
        if not isinstance(states, list):
            raise CheckpointError(f"the checkpoint's state of callbacks is {states!r:.100}, expected a list")
        if any(states) and len(states) != len(self._all):
            raise CheckpointError(
                f"the checkpoint was written with {len(states)} callbacks, now there are {len(self._all)}: "
                "give resume_training the same ones"
            )
        for callback, state in zip(self._all, states, strict=False):
            callback.restore(state)
