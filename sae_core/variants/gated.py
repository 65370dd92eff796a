"""Gated: one half of the encoder decides which latents fire, the other how strongly (arXiv 2404.16014)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sae_granary.sae_core.autograd import Centered, decode, encode_at, per_entry
from sae_granary.sae_core.base import SAE
from sae_granary.sae_core.codes import Codes
from sae_granary.sae_core.data import Activation, SAEOutput
from sae_granary.sae_core.files import saelens
from sae_granary.sae_core.functional import annealed_sparsity
from sae_granary.sae_core.latents import PerLatent
from sae_granary.sae_core.options import FREE, Progress, option
from sae_granary.sae_core.registry import register


@register("gated")
class GatedSAE(SAE):
    """z = H(p_gate) * ReLU(p_mag), p_gate = q + b_gate, p_mag = exp(r_mag) q + b_mag, q = W_enc (x - b_dec).

    Loss + l1_coef * |ReLU(p_gate)|_1 + |x - frozen decoder of ReLU(p_gate)|^2. Decoder rows have unit norm.
    """

    unit_decoder = True
    # The pre-activations of this variant are p_gate; r_mag is a logarithm of a ratio. The names are SAELens'.
    latents: ClassVar[Mapping[str, PerLatent]] = {
        "b_gate": PerLatent(),
        "b_mag": PerLatent(),
        "r_mag": PerLatent(unit=FREE),
    }

    @dataclass(frozen=True)
    class Config(SAE.Config):
        """Options of gated."""

        l1_coef: float = option(5.0, help="Weight of |ReLU(p_gate)|_1, for rows scaled to E|x|^2 = d_in.", ge=0)
        l1_warmup: float = option(0.05, help="Share of the run over which l1_coef rises from 0.", ge=0, le=1)
        p_end: float = option(1.0, help="Exponent of the penalty at the end of the run; 1 is plain L1.", gt=0, le=1)
        p_anneal_from: float = option(0.5, help="Share of the run after which the exponent falls to p_end.", ge=0, lt=1)

    config: Config
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter

    def activate(self, h: Centered) -> Activation:
        """Magnitudes where the gate is open."""
        pre_acts = self.pre_acts(h)
        gate = pre_acts.support(0.0)
        pattern, b_gate = gate.pattern, self.b_gate.detach()
        kept = Codes(gate.values - per_entry(b_gate, pattern), pattern)
        q = encode_at(h, self.W_enc, torch.zeros_like(b_gate), kept)
        p_gate = q + per_entry(self.b_gate, pattern)
        p_mag = q * per_entry(self.r_mag.exp(), pattern) + per_entry(self.b_mag, pattern)
        z = torch.relu(p_mag) * (p_gate.detach() > 0)
        return Activation(Codes(z, pattern), pre_acts, {"gate": torch.relu(p_gate)})

    def penalties(self, out: SAEOutput, progress: Progress) -> dict[str, Tensor]:
        """L1 of the gate, plus the gate's own reconstruction through a frozen decoder, with coefficient 1."""
        gate = Codes(out.extras["gate"], out.codes.pattern)
        scale = self.loss_scale
        coef = self.config.l1_coef * progress.ramp(self.config.l1_warmup) / scale.unit
        exponent = progress.anneal(1.0, self.config.p_end, self.config.p_anneal_from)
        frozen = decode(gate, self.W_dec.detach()) + self.b_dec.detach()
        return {
            "l1": coef * annealed_sparsity(gate.values, exponent) / out.codes.shape[0],
            "aux": scale.reconstruction(frozen, out.source.target),
        }


saelens.express(GatedSAE, "gated", options=lambda cfg: {})
