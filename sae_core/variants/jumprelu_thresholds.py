"""Thresholds of `jumprelu` as parameters, and how the recipe `constraint` holds L0 at its target.

Shapes: N rows, F = d_sae latents. theta = threshold, s = log theta.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from sae_granary.sae_core.latents import BatchThreshold, Entries, PerLatent
from sae_granary.sae_core.variants.jumprelu_recipes import RECIPES

# Adam moves a parameter by at most the sum of its learning rates: too little for log theta in a short run.
SPEED = 10.0
PRICE_EMA, SLOPE_EMA = 0.05, 0.1
GAIN, MAX_SHIFT = 0.3, 0.2  # of the Newton steps that return L0 to its target
LEAST = 1e-30


class LogThreshold(nn.Module):
    """theta = exp(speed * raw): never negative, and moved in steps of `speed` times the learning rate."""

    def __init__(self, d_sae: int, speed: float) -> None:
        super().__init__()
        self.speed = speed
        self.raw = nn.Parameter(torch.zeros(d_sae))

    def forward(self) -> Tensor:
        """Return theta (F,)."""
        return torch.exp(self.raw * self.speed)

    @torch.no_grad()
    def set_to(self, theta: Tensor | float, latents: Tensor | slice = slice(None)) -> None:
        """Set theta of latents (n,); to 0 where it would be negative."""
        self.raw[latents] = torch.as_tensor(theta, dtype=self.raw.dtype).clamp_min(0.0).log() / self.speed


class ControlledThreshold(LogThreshold):
    """Thresholds that move along the surface of equal L0, and a common shift that corrects what is left.

    The window of a threshold reaches half a bandwidth to either side of it. f_i = (entries of latent i in its window) /
    (N bandwidth) estimates -dL0/ds_i. All of a batch is counted before anything moves, whatever its micro-batches.
    """

    price: Tensor
    slope: Tensor
    n_steps: Tensor
    in_window: Tensor
    n_active: Tensor
    n_rows: Tensor

    def __init__(self, d_sae: int, speed: float) -> None:
        super().__init__(d_sae, speed)
        self.register_buffer("price", torch.zeros(()))  # what one active latent per row is worth, in units of the loss
        self.register_buffer("slope", torch.zeros(()))  # sum f: by how much L0 falls per unit of a common shift
        self.register_buffer("n_steps", torch.zeros((), dtype=torch.int64))
        # Of the batch so far: empty between steps, so they are in no file; a rejected batch sets them back.
        self.register_buffer("in_window", torch.zeros(d_sae, dtype=torch.int64), persistent=False)
        self.register_buffer("n_active", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("n_rows", torch.zeros((), dtype=torch.int64), persistent=False)

    def count(self, in_window: Tensor, n_active: int | Tensor, n_rows: int | Tensor) -> None:
        """Add a micro-batch: entries in each latent's window (F,), entries above their threshold, number of rows."""
        self.in_window += in_window
        self.n_active += n_active
        self.n_rows += n_rows

    def project_gradient(self, bandwidth: float) -> None:
        """Remove the part of the gradient that changes L0: g <- g - price * f, price = EMA of <g, f> / <f, f>."""
        if self.raw.grad is None:
            return
        f = self.in_window.to(self.raw.dtype) / (self.n_rows.clamp_min(1).to(self.raw.dtype) * bandwidth)
        price = (self.raw.grad @ f) / self.speed / f.square().sum().clamp_min(LEAST)
        first, one = self.n_steps == 0, torch.ones_like(self.price)
        self.price.lerp_(price, torch.where(first, one, PRICE_EMA))
        self.slope.lerp_(f.sum(), torch.where(first, one, SLOPE_EMA))
        self.n_steps += 1
        self.raw.grad.sub_(self.speed * self.price * f)

    def shift_towards(self, l0: float) -> None:
        """Shift s of all latents by one Newton step that moves L0 toward its target, then clear the counts."""
        excess = self.n_active / self.n_rows.clamp_min(1) - l0
        shift = (GAIN * excess / self.slope.clamp_min(LEAST)).clamp(-MAX_SHIFT, MAX_SHIFT)
        self.raw.add_(torch.where(self.n_rows > 0, shift / self.speed, 0.0))
        self.raw.clamp_(min=math.log(LEAST) / self.speed)  # no threshold gives an L0 above the number of positive p
        for counter in (self.in_window, self.n_active, self.n_rows):
            counter.zero_()


class Threshold(PerLatent):
    """theta as a number of each latent: a parameter, or a `LogThreshold`."""

    def make(self, config: Any) -> nn.Parameter | nn.Module:
        """Create the parameter of the thresholds."""
        recipe = RECIPES[config.recipe]
        if not recipe.logarithm:
            return super().make(config)
        kind = LogThreshold if recipe.penalty is not None else ControlledThreshold
        return kind(config.d_sae, SPEED if recipe.relative else 1.0)

    @torch.no_grad()
    def reset(self, held: Any, config: Any, latents: Tensor | slice = slice(None)) -> None:
        """Reset latents (n,) to their initial threshold; to the geometric mean of all where that was chosen for L0."""
        if not isinstance(held, LogThreshold):
            super().reset(held, config, latents)
        elif RECIPES[config.recipe].relative and not isinstance(latents, slice):
            held.raw[latents] = held.raw.mean()
        else:
            held.set_to(self._start(config), latents)

    def read(self, held: Any, W_dec: Tensor) -> Tensor:
        """Return the thresholds (F,)."""
        return held().detach() if isinstance(held, LogThreshold) else super().read(held, W_dec)

    def write(self, held: Any, numbers: Tensor) -> None:
        """Set thresholds (F,)."""
        if isinstance(held, LogThreshold):
            held.set_to(numbers)
        else:
            super().write(held, numbers)


def bound_with_l0(entries: Entries, l0: float, *, again: bool = False) -> float:
    """The value that on average `l0` entries per row exceed, see `BatchThreshold.calibrate`; at least 1e-6."""
    threshold = BatchThreshold()
    threshold.calibrate(entries, l0, again=again)
    return max(float(threshold.calibrated), 1e-6)
