"""JumpReLU: a learned threshold per latent, trained through straight-through gradients.

Recipes: `tanh` (Anthropic, January 2025 update), `l0` (Rajamanoharan et al., arXiv 2407.14435), `l0_target`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sae_granary.sae_core.autograd import Centered, add_silent, per_entry
from sae_granary.sae_core.base import SAE
from sae_granary.sae_core.codes import Codes, Pattern
from sae_granary.sae_core.data import Activation, SAEOutput
from sae_granary.sae_core.files import saelens
from sae_granary.sae_core.functional import jumprelu, step
from sae_granary.sae_core.latents import PerLatent
from sae_granary.sae_core.options import Progress, option
from sae_granary.sae_core.registry import register

RECIPES = ("tanh", "l0", "l0_target")


@dataclass(frozen=True, eq=False)
class JumpReLUActivation(Activation):
    """Codes of the active entries."""

    silent: Pattern | None = None  # entries at most half a bandwidth under the threshold; None: stored in the codes


@register("jumprelu")
class JumpReLUSAE(SAE):
    """z = p * H(p - theta). Entries up to half a bandwidth under theta are silent, but they move theta."""

    latents: ClassVar[Mapping[str, PerLatent]] = {
        **SAE.latents,
        "threshold": PerLatent(start=lambda config: config.threshold_start),
    }

    @dataclass(frozen=True)
    class Config(SAE.Config):
        """Options of jumprelu."""

        recipe: str = option("tanh", help="sparsity penalty", choices=RECIPES)
        l0_coef: float | None = option(
            None, help="weight of the penalty where E|x|^2 = d_in (default 10 for tanh, else 1)", ge=0
        )
        l0_warmup: float = option(1.0, help="share of the run over which l0_coef rises from 0", ge=0, le=1)
        l0_target: float = option(32.0, help="L0 that recipe l0_target aims at", gt=0)
        tanh_scale: float = option(4.0, help="c in tanh(c z |W_dec|)", gt=0)
        dead_coef: float = option(3e-6, help="weight of the pre-activation loss of dead latents (tanh)", ge=0)
        threshold_init: float | None = option(
            None, help="initial threshold (default 0.1 for tanh, else 0.001 sqrt(d_in))", gt=0
        )
        bandwidth: float | None = option(
            None, help="width of the straight-through kernel (default 2 for tanh, else 0.001 sqrt(d_in))", gt=0
        )

        @property
        def _small(self) -> float:
            return 0.001 * math.sqrt(self.d_in)  # the paper's 0.001 is for E|x|^2 = 1

        @property
        def threshold_start(self) -> float:
            """The thresholds at the start, in units of the normalized pre-activations."""
            return self.threshold_init or (0.1 if self.recipe == "tanh" else self._small)

        @property
        def kernel_width(self) -> float:
            """Width of the straight-through kernel: only training uses it."""
            return self.bandwidth or (2.0 if self.recipe == "tanh" else self._small)

    config: Config
    threshold: nn.Parameter

    def build(self) -> None:
        """The parameters, and what the recipe decides."""
        super().build()
        self.bandwidth = self.config.kernel_width
        default = 10.0 if self.config.recipe == "tanh" else 1.0
        self.l0_coef = default if self.config.l0_coef is None else self.config.l0_coef

    def activate(self, h: Centered) -> Activation:
        """JumpReLU on the active entries; while training, also which are silent within half a bandwidth of theta."""
        pre_acts = self.pre_acts(h)
        threshold = self.threshold.detach()
        reach = self.bandwidth / 2 if self.training else 0.0
        kept, silent = pre_acts.support(threshold - reach), None
        if reach and not kept.pattern.is_full:
            active = kept.values > threshold[kept.indices]
            kept, silent = kept.keep(active), kept.keep(~active).pattern
        p = self.encode_at(h, kept)
        z = jumprelu(p, per_entry(self.threshold, kept.pattern), self.bandwidth)
        return JumpReLUActivation(Codes(z, kept.pattern), pre_acts, {"p": p}, silent)

    def reconstruct_for_losses(self, activation: Activation, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The reconstruction, with gradients of the thresholds from silent entries, and how many these are."""
        recon, extras = super().reconstruct_for_losses(activation, target)
        if not isinstance(activation, JumpReLUActivation) or activation.silent is None:
            return recon, extras
        z = self._silent(-self.threshold / self.bandwidth)
        n_silent = activation.silent.transposed.offsets.diff()
        return add_silent(recon, z, self.W_dec, activation.silent), {**extras, "n_silent": n_silent}

    def _silent(self, slope: Tensor | float) -> Tensor:
        """Zeros (F,) whose derivative in the threshold is `slope`."""
        moved = self.threshold - self.threshold.detach()
        return moved * (slope.detach() if isinstance(slope, Tensor) else slope)

    def penalties(self, out: SAEOutput, progress: Progress) -> dict[str, Tensor]:
        """The recipe's sparsity term and, for tanh, the loss that brings dead latents back."""
        coef = self.l0_coef * progress.ramp(self.config.l0_warmup) / self.loss_scale.unit
        if self.config.recipe != "tanh":
            return {"l0": coef * self._l0_penalty(out)}
        norms = self.W_dec.norm(dim=1)
        scaled = out.codes.values * per_entry(norms, out.codes.pattern)
        total = torch.tanh(self.config.tanh_scale * scaled).sum()
        if "n_silent" in out.extras:  # tanh has slope 1 at 0
            z = self._silent(-self.threshold / self.bandwidth)
            total = total + (out.extras["n_silent"] * self.config.tanh_scale * z * norms.detach()).sum()
        terms = {"l0": coef * total / out.codes.shape[0]}
        dead = self.dead_mask
        if self.config.dead_coef > 0 and bool(dead.any()):
            terms["dead"] = self.config.dead_coef * self._dead_penalty(out, dead, norms) / self.loss_scale.unit
        return terms

    def _l0_penalty(self, out: SAEOutput) -> Tensor:
        """L0, or (L0/target - 1)^2, with gradients to the thresholds."""
        pattern = out.codes.pattern
        steps = step(out.extras["p"], per_entry(self.threshold, pattern), self.bandwidth)
        total = steps.sum()
        if "n_silent" in out.extras:
            total = total + (out.extras["n_silent"] * self._silent(-1.0 / self.bandwidth)).sum()
        l0 = total / out.codes.shape[0]
        return (l0 / self.config.l0_target - 1).square() if self.config.recipe == "l0_target" else l0

    def _dead_penalty(self, out: SAEOutput, dead: Tensor, norms: Tensor) -> Tensor:
        """Mean over rows of sum over dead i of ReLU(theta_i - p_i) |W_dec,i|; dead latents only, or it never ends."""
        latents = dead.nonzero().squeeze(1)
        h = out.pre_acts.rows  # without gradients to b_dec
        p = h @ self.W_enc.t().index_select(0, latents).t() + self.b_enc[latents]
        gap = torch.relu(self.threshold[latents] - p)
        return (gap.sum(0) * norms[latents]).sum() / h.shape[0]

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep thresholds at or above 0: the dead term pulls them down for ever, and under 0 codes turn negative."""
        super().after_step()
        self.threshold.clamp_(min=0.0)


saelens.express(JumpReLUSAE, "jumprelu", options=lambda cfg: {})
