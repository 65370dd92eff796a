"""Metrics of an SAE on held-out rows, accumulated over batches in float64.

Shapes: N rows, D width, F = d_sae latents.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sae_granary.common.device import float64
from sae_granary.sae_core.codes import Codes
from sae_granary.sae_core.normalize import NO_VARIANCE
from sae_granary.sae_core.ranks.reduce import ALONE, Alone

DEAD_THRESHOLD = 0.0005  # firing rate under which a latent counts as rare


class Evaluator:
    """Streaming l0, fvu, densities, cosine and l2_ratio: call `update` per batch, then `result`."""

    def __init__(self, d_in: int, d_sae: int, dead_threshold: float = DEAD_THRESHOLD, shards: Alone = ALONE) -> None:
        """`shards` divide the latents: each has d_sae of them, and the same rows and reconstructions."""
        self.d_in, self.d_sae, self.dead_threshold, self.shards = d_in, d_sae, dead_threshold, shards
        self.n_rows = 0
        self._n_active: Tensor | int = 0  # sums stay on the device of the rows: adding a batch waits for nothing
        self._mean = torch.zeros(d_in, dtype=torch.float64)
        self._scatter: Tensor | float = 0.0  # sum |x - mean|^2 over the rows so far
        self._squares: Tensor | float = 0.0  # sum |x|^2
        self._squared_error: Tensor | float = 0.0
        self._cosine: Tensor | float = 0.0
        self._l2_ratio: Tensor | float = 0.0
        self.fired = torch.zeros(d_sae, dtype=torch.int64)  # rows on which each latent fired

    @torch.no_grad()
    def update(self, x: Tensor, x_hat: Tensor, codes: Codes) -> None:
        """Add a batch: rows x (N, D), their reconstruction x_hat (N, D) and codes."""
        if x.shape[0] == 0:
            return
        x, x_hat = float64(x), float64(x_hat)
        self._update_scatter(x)
        self._squared_error = self._squared_error + (x - x_hat).square().sum()
        self._squares = self._squares + x.square().sum()
        norms = x.norm(dim=1).clamp_min(1e-30)
        norms_hat = x_hat.norm(dim=1)
        self._cosine = self._cosine + ((x * x_hat).sum(1) / (norms * norms_hat.clamp_min(1e-30))).sum()
        self._l2_ratio = self._l2_ratio + (norms_hat / norms).sum()
        fired = codes.fired()
        self.fired = _on(fired.device, self.fired) + fired
        self._n_active = self._n_active + fired.sum()

    def _update_scatter(self, x: Tensor) -> None:
        """Chan's merge of (count, mean, sum of squared deviations): no cancellation for a large mean."""
        n = x.shape[0]
        mean = x.mean(0)
        self._mean = _on(mean.device, self._mean)
        delta = mean - self._mean
        total = self.n_rows + n
        between = delta.square().sum() * self.n_rows * n / total
        self._scatter = self._scatter + ((x - mean).square().sum() + between)
        self._mean = self._mean + delta * (n / total)
        self.n_rows = total

    def of_all(self, ranks: Alone) -> Evaluator:
        """The metrics of the rows of all ranks; of one process this object."""
        if ranks.n == 1:
            return self
        merged = Evaluator(self.d_in, self.d_sae, self.dead_threshold)
        sums = (self._squares, self._squared_error, self._cosine, self._l2_ratio)
        own = (self.n_rows, self.n_active, *map(float, sums))
        n_rows, n_active, *totals = ranks.sum(torch.tensor(own, dtype=torch.float64)).tolist()
        merged.n_rows, merged._n_active = int(n_rows), int(n_active)
        merged._squares, merged._squared_error, merged._cosine, merged._l2_ratio = totals
        mean = self._mean.cpu()
        merged._mean = ranks.sum(mean * self.n_rows) / max(n_rows, 1)
        scatter = float(self._scatter) + self.n_rows * (mean - merged._mean).square().sum()
        merged._scatter = float(ranks.sum(scatter.reshape(1)))
        merged.fired = ranks.sum(self.fired.cpu().clone())
        return merged

    @property
    def n_active(self) -> int:
        """Active latents, summed over the rows."""
        return int(self._n_active)

    def densities(self) -> Tensor:
        """(F,) float64 firing rate of each latent."""
        return float64(self.fired) / max(self.n_rows, 1)

    def result(self) -> dict[str, float | None]:
        """Return the metrics by name: `of_sums` of the sums so far."""
        return self.of_sums({name: float(value) for name, value in self.sums().items()})

    def sums(self) -> dict[str, Tensor | float]:
        """What the metrics follow from: scalars, on the device of the rows."""
        densities, shards = self.densities(), self.shards
        return {
            "n_active": shards.sum(torch.as_tensor(self._n_active).clone()) if shards.n > 1 else self._n_active,
            "scatter": self._scatter,
            "squares": self._squares,
            "squared_error": self._squared_error,
            "cosine": self._cosine,
            "l2_ratio": self._l2_ratio,
            "rare": shards.average(float64(densities < self.dead_threshold).mean()),
            "never_fired": shards.average(float64(densities == 0).mean()),
        }

    def of_sums(self, sums: Mapping[str, float]) -> dict[str, float | None]:
        """Return the metrics by name, from the `sums` of this object's rows.

        l0: mean active latents per row. fvu: sum|e|^2 / sum|x - mean|^2 and explained_variance = 1 - fvu; both None for
        rows without variance, such as a single one. mse: mean over rows of sum_d e^2. cosine, l2_ratio: mean over rows.
        rare: share of latents that fire on less than `dead_threshold` of the rows; never_fired: on none.
        """
        n = max(self.n_rows, 1)
        varies = sums["scatter"] > NO_VARIANCE * sums["squares"]
        fvu = sums["squared_error"] / sums["scatter"] if varies else None
        return {
            "l0": sums["n_active"] / n,
            "fvu": fvu,
            "explained_variance": None if fvu is None else 1.0 - fvu,
            "mse": sums["squared_error"] / n,
            "cosine": sums["cosine"] / n,
            "l2_ratio": sums["l2_ratio"] / n,
            "rare": sums["rare"],
            "never_fired": sums["never_fired"],
        }


def _on(device: torch.device, sums: Tensor) -> Tensor:
    """Sums where the rows are; zeros of the start are not copied there, but made."""
    if sums.device == device:
        return sums
    return sums.to(device) if bool(sums.any()) else torch.zeros_like(sums, device=device)


@torch.no_grad()
def decoder_max_cosine(W_dec: Tensor, chunk: int = 2048, shards: Alone = ALONE) -> float:
    """Mean over latents of the largest |cosine| to another decoder row of W_dec (F, D); lower is better.

    Where `shards` divide the latents, each has F rows of the decoder, and gets those of the others, a part at a time.
    """
    if W_dec.shape[0] * shards.n < 2:
        return 0.0
    rows = W_dec / W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
    total = 0.0
    for start in range(0, rows.shape[0], chunk):
        part = rows[start : start + chunk]
        for rank, others in enumerate(shards.gather(part.reshape(-1))):
            cosines = (others.view_as(part) @ rows.t()).abs()
            if rank == shards.index:
                own = torch.arange(cosines.shape[0], device=rows.device)
                cosines[own, own + start] = 0.0
            largest = -shards.minimum(-cosines.max(dim=1).values)
            total += float(float64(largest).sum())
    return total / (int(rows.shape[0]) * shards.n)
