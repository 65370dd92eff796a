"""What a step wants to know of its gradients before it updates the weights, read from the device at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sae_granary.sae_core.kernels.deferred import Answers, finite
from sae_granary.train.optim.gradients import Gradients, Parameters, norm_of_all
from sae_granary.train.state.run_state import Run


@dataclass(frozen=True, eq=False)
class Asked:
    """Numbers on the device."""

    clipped: Parameters
    norms: Mapping[nn.Parameter, Tensor]
    numbers: tuple[Tensor, Tensor, Tensor]  # for `Deferred.read`: norm, unit of the loss, number of dead latents

    @classmethod
    def of(cls, run: Run) -> Asked | None:
        """Project the gradients of a run; None where the host has already seen NaN or Inf."""
        sae, deferred = run.sae, run.deferred
        with run.row_pass.takes_over():
            sae.project_gradients()
        clipped, others = ([p for p in each if p.grad is not None] for each in run.by_clip)
        norms = run.row_pass.norms(deferred)
        norm = norm_of_all(sae, clipped, norms)
        extremes = [extreme for p in others if p.grad is not None for extreme in torch.aminmax(p.grad)]
        if deferred.failed(finite(norm, *extremes)):
            return None
        return cls(clipped, norms, (norm, sae.core.loss_scale.unit, sae.dead_mask.sum()))

    def answered(self, run: Run, answers: Answers) -> Gradients:
        """The answers to `numbers`."""
        sae, (norm, unit, n_dead) = run.sae, answers.numbers
        run.deferred.remember_count("dead", sae.core.num_tokens_since_fired, int(n_dead))
        held, fits = (sae.shards.all(sae.ranks.all(answer)) for answer in (answers.held, answers.fits))
        # A clip of 1 is published for the loss in its own units, where E|x|^2 = d: the unit is put back.
        return Gradients(held, fits, norm, self.norms, float(np.float32(norm) * np.float32(unit)), self.clipped)
