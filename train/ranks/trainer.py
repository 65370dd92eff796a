"""The trainer of one rank. All take the same steps and end together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sae_granary.cache.load.loader import Batch
from sae_granary.cache.load.whole_contexts import Contexts
from sae_granary.common.signals import StopRequest
from sae_granary.sae_core import SAE
from sae_granary.sae_core.ranks.reduce import ALONE, Alone
from sae_granary.train.callbacks import StepEvent
from sae_granary.train.optim import resample
from sae_granary.train.optim.optimizers import load_state_tensors, state_tensors
from sae_granary.train.ranks.world import World
from sae_granary.train.state.run_state import Run
from sae_granary.train.trainer import Result, Trainer


class RankTrainer(Trainer):
    """A trainer of one of several ranks.

    `asked` is what a signal to this process sets. After each step the ranks agree whether one of them was asked to stop
    and whether rank 0 has ended the run; `agreed` holds that, so that all stop at the same step.
    """

    def __init__(self, world: World, asked: StopRequest, *args: Any) -> None:
        super().__init__(*args)
        self.world, self.asked, self.agreed = world, asked, StopRequest()
        self._ended = False
        asked.defer()
        self._join()
        self._agree()

    def _join(self) -> None:
        """Before the first step: what the ranks have in common."""

    def _save_is_due(self) -> bool:
        return self.run.done or super()._save_is_due()

    @property
    def done(self) -> bool:
        """Whether the run has ended, on every rank at the same step."""
        return self._ended

    def _agree(self) -> None:
        """One reduction: the signal that any rank got, and whether rank 0 has ended the run."""
        ended = self.world.place.leads and self.run.done
        least = self.world.ranks.minimum(torch.tensor([-(self.asked.signum or 0), -int(ended)])).tolist()
        self.agreed.signum = -least[0] or None
        self._ended = bool(least[1])

    def begin(self) -> None:
        """Tell the sinks of rank 0."""
        if self.world.place.leads:
            super().begin()

    def take(self, batch: Batch | Contexts, waited: float) -> None:
        """Take one step with the other ranks."""
        super().take(batch, waited)
        self._agree()


class RowsTrainer(RankTrainer):
    """A trainer that shares the rows of its batches with the other ranks. Rank 0 logs, writes and evaluates."""

    def _join(self) -> None:
        share_batches(self.run.sae, self.world.ranks)

    def _log(self, event: StepEvent) -> None:
        if self.world.place.leads:
            super()._log(event)
        else:
            self._resample()

    def _resample(self) -> dict[str, float]:
        """Rank 0 resamples alone, then sends all that this changed."""
        numbers: dict[str, float] = {}
        if resample.is_due(self.run.config, self.run.step, self.run.n_steps):
            if self.world.place.leads:
                with alone(self.run.sae):
                    numbers = super()._resample()
            self.world.ranks.broadcast([*tensors_of(self.run.sae), *optimizer_state(self.run).values()])
        return numbers

    def _save_is_due(self) -> bool:
        return self.world.place.leads and super()._save_is_due()

    def save(self) -> None:
        """Rank 0 writes a checkpoint."""
        if self.world.place.leads:
            super().save()

    def finish(self, stop: StopRequest) -> Result:
        """Rank 0 calibrates, evaluates and writes; the others get its SAE and its summary."""
        self.world.watch(not self.world.place.leads)  # a result can be written without the others
        if self.world.place.leads:
            with alone(self.run.sae):
                result = super().finish(self.asked)
            self.world.say("result", result.summary)
            summary = result.summary
        else:
            summary = self.world.hear("result")
        self.world.ranks.broadcast(tensors_of(self.run.sae))
        share_batches(self.run.sae, ALONE)
        return Result(self.run.sae.eval(), self.folder, summary)


def share_batches(sae: SAE, ranks: Alone) -> None:
    """Have an SAE, and the one that it may wrap, reduce over ranks in training."""
    for module in sae.modules():
        if isinstance(module, SAE):
            module.ranks = ranks


@contextmanager
def alone(sae: SAE) -> Iterator[None]:
    """Context manager: an SAE whose training mode sees only the rows that this process gives it."""
    ranks = sae.ranks
    share_batches(sae, ALONE)
    try:
        yield
    finally:
        share_batches(sae, ranks)


def tensors_of(sae: SAE) -> list[Tensor]:
    """Parameters and buffers, in one order on all ranks."""
    return [*(p.data for p in sae.parameters()), *sae.buffers()]


def optimizer_state(run: Run) -> dict[str, Tensor]:
    """The optimizer's tensors by name."""
    return state_tensors(run.optimizer, run.parameter_names)


def send_state(world: World, run: Run) -> None:
    """Rank 0 sends weights, counters and the optimizer's state to all."""
    moments = {name: t.detach().cpu().contiguous() for name, t in optimizer_state(run).items()}
    shapes = {name: (list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in moments.items()}
    counts = {name: getattr(run, name) for name in ("step", "tokens", "rejected", "rejected_in_row")}
    world.say("state", {"counts": counts, "moments": shapes})
    world.ranks.broadcast([*tensors_of(run.sae), *moments.values()])


def receive_state(world: World, run: Run) -> None:
    """The other side of `send_state`, for a new run."""
    told = world.hear("state")
    moments = {
        name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (shape, dtype) in told["moments"].items()
    }
    world.ranks.broadcast([*tensors_of(run.sae), *moments.values()])
    load_state_tensors(run.optimizer, run.parameter_names, moments)
    for name, value in told["counts"].items():
        setattr(run, name, value)
