"""Firing rates of latents over a window of measured batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_granary.common.device import float64
from sae_granary.sae_core.ranks.reduce import ALONE, Alone

LOG_FLOOR = 1e-10  # density of a latent that never fired, as in SAELens' histogram


@dataclass(eq=False)
class Density:
    """Counts over the measured batches since the window started; part of a checkpoint."""

    fired: Tensor  # (F,) int64, on the device of the counts
    n_rows: int = 0

    @classmethod
    def of(cls, d_sae: int) -> Density:
        """An empty window."""
        return cls(torch.zeros(d_sae, dtype=torch.int64))

    def update(self, fired: Tensor, n_rows: int) -> None:
        """Add the counts of a batch."""
        self.fired = self.fired.to(fired.device) + fired
        self.n_rows += n_rows

    def clear(self) -> None:
        """Start a new window."""
        self.fired = torch.zeros_like(self.fired)
        self.n_rows = 0

    @property
    def log10(self) -> Tensor:
        """(F,) log10 of the firing rates."""
        return (float64(self.fired) / max(self.n_rows, 1) + LOG_FLOOR).log10()

    def numbers(self, dead_threshold: float, shards: Alone = ALONE) -> dict[str, float]:
        """Mean log10 rate, share of latents below the threshold, share that never fired, over the measured batches.

        Of the latents of all `shards`, where they are divided.
        """
        rates = float64(self.fired) / max(self.n_rows, 1)
        return {
            "mean_log10_density": float(shards.average(self.log10.mean())),
            "density/rare": float(shards.average(float64(rates < dead_threshold).mean())),
            "density/never_fired": float(shards.average(float64(self.fired == 0).mean())),
        }
