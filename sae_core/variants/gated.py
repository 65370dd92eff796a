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
from sae_granary.sae_core.functional import annealed_sparsity
from sae_granary.sae_core.options import Progress, option
from sae_granary.sae_core.registry import register


@register("gated")
class GatedSAE(SAE):
    """z = H(p_gate) * ReLU(p_mag), p_gate = q + b_gate, p_mag = exp(r_mag) q + b_mag, q = W_enc (x - b_dec).

    Loss + l1_coef * |ReLU(p_gate)|_1 + |x - frozen decoder of ReLU(p_gate)|^2. Decoder rows have unit norm.
    """

    unit_decoder = True
    saelens_architecture = "gated"
    reads_saelens = "gated"
    unscaled_latent_tensors: ClassVar[frozenset[str]] = frozenset({"r_mag"})  # a logarithm of a ratio

    @dataclass(frozen=True)
    class Config(SAE.Config):
        """Options of gated."""

        l1_coef: float = option(5.0, help="weight of |ReLU(p_gate)|_1 where E|x|^2 = d_in", ge=0)
        l1_warmup: float = option(0.05, help="share of the run over which l1_coef rises from 0", ge=0, le=1)
        p_end: float = option(1.0, help="exponent of the penalty at the end of the run; 1 is plain L1", gt=0, le=1)
        p_anneal_from: float = option(0.5, help="share of the run after which the exponent falls to p_end", ge=0, lt=1)

    config: Config

    def build_latent_parameters(self) -> None:
        """b_gate, b_mag and r_mag."""
        self.b_gate = nn.Parameter(torch.zeros(self.config.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(self.config.d_sae))
        self.r_mag = nn.Parameter(torch.zeros(self.config.d_sae))

    @property
    def encoder_bias(self) -> Tensor:
        """The gate's bias: the pre-activations of this variant are p_gate."""
        return self.b_gate

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
        """The L1 of the gate, and the gate's own reconstruction through a frozen decoder, with coefficient 1."""
        gate = Codes(out.extras["gate"], out.codes.pattern)
        coef = self.config.l1_coef * progress.ramp(self.config.l1_warmup) / self.loss_unit
        exponent = progress.anneal(1.0, self.config.p_end, self.config.p_anneal_from)
        frozen = decode(gate, self.W_dec.detach()) + self.b_dec.detach()
        return {
            "l1": coef * annealed_sparsity(gate.values, exponent) / out.codes.shape[0],
            "aux": self.reconstruction_loss(frozen, out.source.target),
        }

    @torch.no_grad()
    def reset_latents(self, latents: Tensor) -> None:
        """No biases, and magnitudes as the gate sees them."""
        for parameter in (self.b_gate, self.b_mag, self.r_mag):
            parameter[latents] = 0.0

    def latent_tensors(self) -> dict[str, Tensor]:
        """SAELens' names, which are the paper's."""
        return {"b_gate": self.b_gate.detach(), "b_mag": self.b_mag.detach(), "r_mag": self.r_mag.detach()}

    @torch.no_grad()
    def set_latent_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over b_gate, b_mag and r_mag."""
        for name in ("b_gate", "b_mag", "r_mag"):
            getattr(self, name).copy_(tensors[name])
