"""JumpReLU: a learned threshold per latent, trained with straight-through gradients.

Recipes: `constraint` (ours) holds L0 at `l0_target`; `l0_penalty` and `tanh_penalty` (ours) have a coefficient; `gemma`
(Rajamanoharan et al., arXiv 2407.14435) and `anthropic` (January 2025 update, without its initialization of b_enc) are
published. `tanh`, `l0` and `l0_target` are those of earlier versions. `RECIPES` lists the differences.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from sae_granary.sae_core.autograd import Centered, add_silent, per_entry, sum_by_latent, sum_rows_by_latent
from sae_granary.sae_core.base import SAE
from sae_granary.sae_core.codes import Codes, Pattern
from sae_granary.sae_core.data import Activation, Inputs, SAEOutput, as_rows
from sae_granary.sae_core.files import saelens
from sae_granary.sae_core.functional import jumprelu, step
from sae_granary.sae_core.kernels.deferred import host_waits
from sae_granary.sae_core.latents import PerLatent
from sae_granary.sae_core.losses import Dictionary, auxk_loss, dead_latents
from sae_granary.sae_core.options import Progress
from sae_granary.sae_core.registry import register
from sae_granary.sae_core.variants.jumprelu_recipes import RECIPES, JumpReLUConfig
from sae_granary.sae_core.variants.jumprelu_thresholds import (
    ControlledThreshold,
    LogThreshold,
    Threshold,
    bound_with_l0,
)

START_ROWS, START_PART = 4096, 512  # that the first threshold is taken from; at a time


@dataclass(frozen=True, eq=False)
class JumpReLUActivation(Activation):
    """Codes of the active entries."""

    silent: Pattern | None = None  # entries at most half a bandwidth under the threshold; None: stored in the codes


@register("jumprelu")
class JumpReLUSAE(SAE):
    """z = p * H(p - theta). Entries up to half a bandwidth below theta are silent but contribute to its gradient."""

    latents: ClassVar[Mapping[str, PerLatent]] = {
        **SAE.latents,
        "threshold": Threshold(start=lambda config: config.threshold_start),
    }
    unclipped = ("threshold.raw",)  # its gradient has the unit of L0, and is far larger than that of the matrices

    Config: TypeAlias = JumpReLUConfig
    config: JumpReLUConfig
    threshold: nn.Parameter | LogThreshold

    def build(self) -> None:
        """Create the parameters and apply the recipe."""
        self.recipe = RECIPES[self.config.recipe]
        self.unit_decoder = self.recipe.unit_rows
        super().build()
        self.bandwidth = self.config.kernel_width
        self.l0_coef = self.recipe.coef if self.config.l0_coef is None else self.config.l0_coef

    @torch.no_grad()
    def initialize(self, sample: Inputs, generator: torch.Generator) -> None:
        """Initialize as usual, then set all thresholds to the value at which the sample has the wanted L0."""
        super().initialize(sample, generator)
        if not self.recipe.relative or self.config.threshold_init is not None:
            return
        assert isinstance(self.threshold, LogThreshold)
        first = {hook: rows[:START_ROWS] for hook, rows in as_rows(sample, like=self.b_dec).items()}
        parts = torch.split(self.encoder_input(first).values, START_PART)
        acts = ((len(part), self.pre_acts(Centered(part)).dense) for part in parts)
        self.threshold.set_to(bound_with_l0(lambda bound: acts, self.config.l0_target))

    @property
    def theta(self) -> Tensor:
        """Thresholds (F,), in units of the normalized pre-activations."""
        return self.threshold() if isinstance(self.threshold, LogThreshold) else self.threshold

    def _width(self, pattern: Pattern | None = None) -> float | Tensor:
        """Width of the kernel: one number, or one for each latent (F,) or entry."""
        if not self.recipe.relative:
            return self.bandwidth
        width = self.bandwidth * self.theta.detach()
        return width if pattern is None else per_entry(width, pattern)

    def activate(self, h: Centered) -> Activation:
        """JumpReLU on the active entries; in training, also the silent ones within half a bandwidth below theta."""
        pre_acts, theta = self.pre_acts(h), self.theta
        threshold = theta.detach()
        kept, silent = pre_acts.support(threshold - self._width() / 2 if self.training else threshold), None
        separates = not self.recipe.to_input and not host_waits(h.values)  # the silent ones need not be decoded
        if self.training and separates and not kept.pattern.is_full:
            active = kept.values > threshold[kept.indices]
            kept, silent = kept.keep(active), kept.keep(~active).pattern
        p = self.encode_at(h, kept)
        width = self._width(kept.pattern)
        z = jumprelu(p, per_entry(theta, kept.pattern), width, to_input=self.recipe.to_input)
        return JumpReLUActivation(Codes(z, kept.pattern), pre_acts, {"p": p}, silent)

    def reconstruct_for_losses(self, activation: Activation, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The reconstruction with threshold gradients from silent entries, and the number of those entries."""
        recon, extras = super().reconstruct_for_losses(activation, target)
        if not isinstance(activation, JumpReLUActivation) or activation.silent is None:
            return recon, extras
        z = self._silent(-self.theta / self._width())
        n_silent = activation.silent.transposed.offsets.diff()
        return add_silent(recon, z, self.W_dec, activation.silent), {**extras, "n_silent": n_silent}

    def _silent(self, slope: Tensor | float) -> Tensor:
        """Zeros (F,) whose derivative with respect to the threshold is `slope`."""
        theta = self.theta
        return (theta - theta.detach()) * (slope.detach() if isinstance(slope, Tensor) else slope)

    def penalties(self, out: SAEOutput, progress: Progress) -> dict[str, Tensor]:
        """The recipe's sparsity term, and AuxK or the pre-activation loss, which revive dead latents."""
        terms = {} if self.recipe.penalty is None else self._sparsity(out, progress)
        if self.recipe.relative and self.config.auxk_coef > 0 and len(dead := dead_latents(self)):
            error = (out.source.target - out.recon).detach()
            weights = Dictionary(self.W_enc, self.encoder_bias, self.W_dec)
            auxk = auxk_loss(error, out.pre_acts, weights, dead, max(1, self.d_out // 2), ranks=self.ranks)
            terms["auxk"] = self.config.auxk_coef * auxk * self.loss_scale.fvu_unit
        return terms

    def _sparsity(self, out: SAEOutput, progress: Progress) -> dict[str, Tensor]:
        unit = self.loss_scale.unit
        coef = self.l0_coef * progress.ramp(self.config.warmup_share(progress.n_steps)) / unit
        if self.recipe.penalty != "tanh":
            return {"l0": coef * self._l0(out)}
        norms = self.W_dec.norm(dim=1)
        terms = {"l0": coef * self._tanh(out, norms) / out.codes.shape[0]}
        only_dead = self.recipe.revives == "dead"
        revived = dead_latents(self) if only_dead else torch.arange(self.config.d_sae, device=norms.device)
        if self.config.dead_coef > 0 and len(revived):
            terms["dead"] = self.config.dead_coef * self._dead_penalty(out, revived, norms) / unit
        return terms

    def _tanh(self, out: SAEOutput, norms: Tensor) -> Tensor:
        """Sum of tanh(c z |W_dec|), whose derivatives are those of z."""
        scaled = out.codes.values * per_entry(norms, out.codes.pattern)
        total = torch.tanh(self.config.tanh_scale * scaled).sum()
        if "n_silent" in out.extras:  # tanh has slope 1 at 0
            z = self._silent(-self.theta / self._width())
            total = total + (out.extras["n_silent"] * self.config.tanh_scale * z * norms.detach()).sum()
        return total

    def _l0(self, out: SAEOutput) -> Tensor:
        """L0 with gradients to the thresholds, or (L0/target - 1)^2, or the mean of sum tanh(c p) H(p - theta).

        In the last a threshold that moves past p costs what it switches: its gradient is that of tanh(c theta) H.
        """
        p, pattern, width = out.extras["p"], out.codes.pattern, self._width()
        steps = step(p, per_entry(self.theta, pattern), self._width(pattern))
        slope = -1.0 / width
        if self.recipe.penalty == "jump":
            jump = torch.tanh(self.config.tanh_scale * self.theta.detach())
            acts = torch.tanh(self.config.tanh_scale * p) * steps.detach()
            steps, slope = acts + per_entry(jump, pattern) * (steps - steps.detach()), jump * slope
        total = steps.sum()
        if "n_silent" in out.extras:
            total = total + (out.extras["n_silent"] * self._silent(slope)).sum()
        l0 = self.ranks.mean(total / out.codes.shape[0], out.codes.shape[0])
        return (l0 / self.config.l0_target - 1).square() if self.recipe.penalty == "l0_target" else l0

    def _dead_penalty(self, out: SAEOutput, latents: Tensor, norms: Tensor) -> Tensor:
        """Mean over rows of sum over some i of ReLU(theta_i - p_i) |W_dec,i|; over all of them it never ends."""
        h = out.pre_acts.rows  # without gradients to b_dec
        # Of a latent all rows count in which it is not active; their number and their sum are enough.
        active = (out.codes.values.detach() != 0).to(h.dtype)
        below = len(h) - sum_by_latent(active, out.codes.pattern)
        rows_below = h.sum(0) - sum_rows_by_latent(h, active, out.codes.pattern)
        gaps: Tensor = below * (self.theta - self.b_enc) - torch.linalg.vecdot(rows_below, self.W_enc.t())
        return (gaps * norms)[latents].sum() / len(h)

    # -- L0 as a constraint ----------------------------------------------------------------------------------------

    @property
    def _controlled(self) -> ControlledThreshold | None:
        return self.threshold if isinstance(self.threshold, ControlledThreshold) else None

    def monitor(self, out: SAEOutput) -> dict[str, Tensor | float]:
        """The price: the loss per additional active latent per row."""
        return {} if self._controlled is None else {"price": self._controlled.price}

    @torch.no_grad()
    def track(self, out: SAEOutput) -> None:
        """Update dead counters; for the constraint, count the entries near and above each threshold."""
        super().track(out)
        if self._controlled is None:
            return
        p, pattern, width = out.extras["p"].detach(), out.codes.pattern, self._width(out.codes.pattern)
        near = (p - per_entry(self.theta, pattern)).abs() < width / 2
        counts = pattern.count(near) + out.extras.get("n_silent", 0)
        n_active, n_rows = (out.codes.values != 0).sum(), pattern.n_rows
        counts, numbers = self.ranks.total(counts, n_active, n_rows)
        self._controlled.count(counts, *numbers)

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Project gradients as usual; for the constraint, also remove what would change L0 from those of thresholds."""
        super().project_gradients()
        if self._controlled is not None:
            self._controlled.project_gradient(self.bandwidth)

    @torch.no_grad()
    def after_step(self) -> None:
        """Normalize decoder rows, correct L0 toward its target, and clamp thresholds at 0.

        The dead term of `tanh` pulls thresholds down without end; below 0, codes would be negative.
        """
        super().after_step()
        if self._controlled is not None:
            self._controlled.shift_towards(self.config.l0_target)
        elif isinstance(self.threshold, nn.Parameter):
            self.threshold.clamp_(min=0.0)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Inputs]) -> None:
        """Shift the thresholds of `constraint` together so that the mean L0 over the batches is the target."""
        if self._controlled is None:
            return
        theta = self.theta

        def ratios(bound: float) -> Iterator[tuple[int, Tensor]]:
            for x in batches:
                yield from self.pre_acts(self.encoder_input(x)).at_least_above(bound, theta)

        again = not isinstance(batches, Iterator)
        self._controlled.set_to(theta * bound_with_l0(ratios, self.config.l0_target, again=again))


# Recipes are for training; theirs has a parameter per threshold and free decoder rows, as `tanh`.
saelens.express(JumpReLUSAE, "jumprelu", options=lambda cfg: {"recipe": "tanh"})
