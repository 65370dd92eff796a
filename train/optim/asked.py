"""What a step wants to know of its gradients before it updates the weights, read from the device at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from sae_granary.sae_core.kernels.deferred import Answers
from sae_granary.train.optim.gradients import Gradients, are_finite, clipped, is_finite, norm_of_all
from sae_granary.train.state.run_state import Run


@dataclass(frozen=True, eq=False)
class Asked:
    """Numbers on the device."""

    norms: Mapping[nn.Parameter, Tensor]
    numbers: tuple[Tensor, Tensor, Tensor]  # for `Deferred.read`: norm, norm in units, number of dead latents

    @classmethod
    def of(cls, run: Run) -> Asked | None:
        """Project the gradients of a run; None where the host has already seen NaN or Inf."""
        sae, deferred = run.sae, run.deferred
        with run.row_pass.takes_over():
            sae.project_gradients()
        together, norms = clipped(sae), run.row_pass.norms(deferred)
        norm = norm_of_all(sae, together, norms)
        if deferred.failed(is_finite(norm)) or any(deferred.failed(ok) for ok in are_finite(sae, but=together)):
            return None
        # A clip of 1 is published for the loss in its own units, where E|x|^2 = d: the unit is put back.
        return cls(norms, (norm, norm * sae.core.loss_scale.unit, sae.dead_mask.sum()))

    def answered(self, run: Run, answers: Answers) -> Gradients:
        """The answers to `numbers`."""
        sae, (norm, norm_in_units, n_dead) = run.sae, answers.numbers
        run.deferred.remember_count("dead", sae.core.num_tokens_since_fired, int(n_dead))
        fits = sae.shards.all(sae.ranks.all(answers.fits))
        return Gradients(answers.held, fits, norm, self.norms, norm_in_units)
