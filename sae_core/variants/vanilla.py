"""Vanilla: ReLU and an L1 penalty weighted by the decoder norms (Anthropic, April 2024 update)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_granary.sae_core.autograd import Centered, per_entry
from sae_granary.sae_core.base import SAE
from sae_granary.sae_core.codes import Codes
from sae_granary.sae_core.data import Activation, SAEOutput
from sae_granary.sae_core.files import saelens
from sae_granary.sae_core.functional import annealed_sparsity
from sae_granary.sae_core.options import Progress, option
from sae_granary.sae_core.registry import register


@register("vanilla")
class VanillaSAE(SAE):
    """z = ReLU(p); loss + l1_coef * sum_i z_i |W_dec,i|. The decoder norms are free."""

    @dataclass(frozen=True)
    class Config(SAE.Config):
        """Options of vanilla."""

        l1_coef: float = option(5.0, help="Weight of the sum of z|W_dec|, for rows scaled to E|x|^2 = d_in.", ge=0)
        l1_warmup: float = option(0.05, help="Share of the run over which l1_coef rises from 0.", ge=0, le=1)
        p_end: float = option(1.0, help="Exponent of the penalty at the end of the run; 1 is plain L1.", gt=0, le=1)
        p_anneal_from: float = option(0.5, help="Share of the run after which the exponent falls to p_end.", ge=0, lt=1)

    config: Config

    def activate(self, h: Centered) -> Activation:
        """ReLU of the pre-activations."""
        pre_acts = self.pre_acts(h)
        kept = pre_acts.support(0.0)
        return Activation(Codes(torch.relu(self.encode_at(h, kept)), kept.pattern), pre_acts)

    def penalties(self, out: SAEOutput, progress: Progress) -> dict[str, Tensor]:
        """The L1 term, in the units of the loss."""
        norms = per_entry(self.W_dec.norm(dim=1), out.codes.pattern)
        exponent = progress.anneal(1.0, self.config.p_end, self.config.p_anneal_from)
        l1 = annealed_sparsity(out.codes.values * norms, exponent) / out.codes.shape[0]
        coef = self.config.l1_coef * progress.ramp(self.config.l1_warmup)
        return {"l1": coef * l1 / self.loss_scale.unit}


saelens.express(VanillaSAE, "standard", options=lambda cfg: {})
