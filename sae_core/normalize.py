"""Input normalization in front of every variant, and its undoing behind it.

Shapes: N rows, D = d_in. Metrics are reported in raw space; losses are computed in the normalized space.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

FIXED_MODES = ("dataset", "mean", "mean+dataset", "none")  # those that can be folded into the weights
UNIT_NORM_EPS = 1e-5  # SAELens' layer_norm


@dataclass(frozen=True, eq=False)
class Normalized:
    """Rows in the normalized space with what undoes it: raw = values * std + shift."""

    values: Tensor  # (N, D)
    std: Tensor  # (N, 1) or ()
    shift: Tensor  # (N, 1) or (D,)

    def undo(self, values: Tensor) -> Tensor:
        """Map values (N, D) of the normalized space back to raw space."""
        return values * self.std + self.shift


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
        """Take mean and scale from a sample (N, D) of raw rows."""
        rows = sample.double()
        if self.mode in ("mean", "mean+dataset"):
            self.mean.copy_(rows.mean(0))
            rows = rows - rows.mean(0)
        if self.mode in ("dataset", "mean+dataset"):
            mean_square = rows.square().sum(1).mean().clamp_min(1e-30)
            self.scale.copy_((rows.shape[1] / mean_square).sqrt())

    def forward(self, x: Tensor) -> Normalized:
        """Normalize raw rows (N, D)."""
        if self.per_row:
            shift = x.mean(-1, keepdim=True)
            centered = x - shift
            std = torch.linalg.vector_norm(centered, dim=-1, keepdim=True) / math.sqrt(x.shape[-1] - 1)
            return Normalized(centered / (std + UNIT_NORM_EPS), std, shift)
        return Normalized((x - self.mean) * self.scale, 1.0 / self.scale, self.mean)

    def scaling(self) -> Affine:
        """The fixed part; for unit_norm it changes nothing."""
        return Affine(self.scale.expand_as(self.mean), self.mean)
