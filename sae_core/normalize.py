"""Input normalization and its inverse.

Shapes: N rows, D = d_in. Metrics are reported in raw space; losses are computed in the normalized space.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae_granary.common.device import float64
from sae_granary.sae_core.errors import NonFiniteError
from sae_granary.sae_core.functional import blocks, column_means

FIXED_MODES = ("dataset", "mean", "mean+dataset", "none")  # those that can be folded into the weights
UNIT_NORM_EPS = 1e-5  # SAELens' layer_norm
NO_VARIANCE = 1e-18  # share of sum |x|^2 under which the scatter of float32 rows is rounding
SANE_SQUARES = (1e-24, 1e24)  # E|x|^2 of rows: float32 has room on both sides for squares and their sums


@dataclass(frozen=True, eq=False)
class Normalized:
    """Normalized rows with their inverse."""

    values: Tensor  # (N, D)
    undo: Callable[[Tensor], Tensor]  # maps values (N, D) of the normalized space back to raw space


class Affine(NamedTuple):
    """A fixed normalization: (x - mean) * scale."""

    scale: Tensor  # (D,)
    mean: Tensor  # (D,)

    def undo(self, values: Tensor) -> Tensor:
        """Map values (N, D) of the normalized space back to raw space."""
        return values / self.scale + self.mean


class Normalizer(nn.Module):
    """Normalize rows: none, unit_norm (per row), dataset (one scalar, E|x|^2 = D), mean, mean+dataset.

    unit_norm is (x - mean_d)/(std_d + 1e-5) with the unbiased standard deviation, undone with std_d, as Bussmann's
    `input_unit_norm` and SAELens' `layer_norm` do. The others are fixed by `fit` and folded into the weights at export.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mode: str, d_in: int) -> None:
        super().__init__()
        self.mode = mode
        self.register_buffer("mean", torch.zeros(d_in))
        self.register_buffer("scale", torch.ones(()))

    @property
    def per_row(self) -> bool:
        """Whether undoing needs each row's own statistics."""
        return self.mode == "unit_norm"

    @torch.no_grad()
    def fit(self, sample: Tensor) -> None:
        """Fit mean and scale to a sample (N, D) of raw rows. Raises NonFiniteError for NaN, Inf and absurd values."""
        mean_square = check_scale(sample)
        if self.mode in ("mean", "mean+dataset"):
            mean = column_means(sample)
            self.mean.copy_(mean)
            if self.mode == "mean+dataset":
                mean_square = check_scale(sample, mean)
        if self.mode in ("dataset", "mean+dataset"):
            self.scale.copy_((sample.shape[1] / mean_square).sqrt())

    def forward(self, x: Tensor) -> Normalized:
        """Normalize raw rows (N, D)."""
        if self.per_row:
            shift = x.mean(-1, keepdim=True)
            centered = x - shift
            std = torch.linalg.vector_norm(centered, dim=-1, keepdim=True) / math.sqrt(x.shape[-1] - 1)
            return Normalized(centered / (std + UNIT_NORM_EPS), lambda values: values * std + shift)
        x = x - self.mean if "mean" in self.mode else x
        x = x * self.scale if "dataset" in self.mode else x
        return Normalized(x, lambda values: values * (1.0 / self.scale) + self.mean)

    def scaling(self) -> Affine:
        """The fixed part of the normalization; the identity for unit_norm."""
        return Affine(self.scale.expand_as(self.mean), self.mean)


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """V = E|x - mean|^2 and E|x|^2 of rows (N, D), float64. Raises NonFiniteError where all rows are equal."""
    variance, mean_square = _mean_square(rows, column_means(rows)), _mean_square(rows)
    if not float(variance) > NO_VARIANCE * float(mean_square):
        raise NonFiniteError(f"the {len(rows):,} rows of the sample are all equal: there is nothing to learn from them")
    return variance, mean_square


def check_scale(rows: Tensor, mean: Tensor | None = None) -> Tensor:
    """E|x|^2 of rows (N, D), or E|x - mean|^2, float64.

    Raises NonFiniteError where it is not finite, or too small or large to compute with.
    """
    mean_square = _mean_square(rows, mean)
    low, high = SANE_SQUARES
    if not low <= float(mean_square) <= high:
        found = f"a mean squared norm of {float(mean_square):.3g}" if bool(rows.isfinite().all()) else "NaN or Inf"
        raise NonFiniteError(
            f"the sample that the normalization is fitted to has {found}, expected {low:g} to {high:g}: "
            "check the cache with `sae-cache verify`"
        )
    return mean_square


def _mean_square(rows: Tensor, mean: Tensor | None = None) -> Tensor:
    """E|x - mean|^2 in float64."""
    exact = (float64(block) if mean is None else float64(block) - mean for block in blocks(rows))
    return torch.cat([block.square().sum(1) for block in exact]).mean()
