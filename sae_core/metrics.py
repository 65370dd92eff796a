"""Metrics of an SAE on held-out rows, accumulated over batches in float64.

Shapes: N rows, D width, F = d_sae latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_granary.common.device import float64
from sae_granary.sae_core.codes import Codes
from sae_granary.sae_core.normalize import NO_VARIANCE
from sae_granary.sae_core.ranks.reduce import Alone

DEAD_THRESHOLD = 0.0005  # firing rate under which a latent counts as rare


class Evaluator:
    """Streaming l0, fvu, densities, cosine and l2_ratio: call `update` per batch, then `result`."""

    def __init__(self, d_in: int, d_sae: int, dead_threshold: float = DEAD_THRESHOLD) -> None:
        self.d_in, self.d_sae, self.dead_threshold = d_in, d_sae, dead_threshold
        self.n_rows = 0
        self.n_active = 0
        self._mean = torch.zeros(d_in, dtype=torch.float64)
        self._scatter = 0.0  # sum |x - mean|^2 over the rows so far
        self._squares = 0.0  # sum |x|^2
        self._squared_error = 0.0
        self._cosine = 0.0
        self._l2_ratio = 0.0
        self.fired = torch.zeros(d_sae, dtype=torch.int64)  # rows on which each latent fired

    @torch.no_grad()
    def update(self, x: Tensor, x_hat: Tensor, codes: Codes) -> None:
        """Add a batch: rows x (N, D), their reconstruction x_hat (N, D) and codes."""
        if x.shape[0] == 0:
            return
        x, x_hat = float64(x), float64(x_hat)
        self._update_scatter(x)
        self._squared_error += float((x - x_hat).square().sum())
        self._squares += float(x.square().sum())
        norms = x.norm(dim=1).clamp_min(1e-30)
        norms_hat = x_hat.norm(dim=1)
        self._cosine += float(((x * x_hat).sum(1) / (norms * norms_hat.clamp_min(1e-30))).sum())
        self._l2_ratio += float((norms_hat / norms).sum())
        fired = codes.fired().cpu()
        self.fired += fired
        self.n_active += int(fired.sum())

    def _update_scatter(self, x: Tensor) -> None:
        """Chan's merge of (count, mean, sum of squared deviations): no cancellation for a large mean."""
        n = x.shape[0]
        mean = x.mean(0)
        delta = mean.cpu() - self._mean
        total = self.n_rows + n
        self._scatter += float((x - mean).square().sum()) + float(delta.square().sum()) * self.n_rows * n / total
        self._mean += delta * (n / total)
        self.n_rows = total

    def of_all(self, ranks: Alone) -> Evaluator:
        """The metrics of the rows of all ranks; of one process this object."""
        if ranks.n == 1:
            return self
        merged = Evaluator(self.d_in, self.d_sae, self.dead_threshold)
        own = (self.n_rows, self.n_active, self._squares, self._squared_error, self._cosine, self._l2_ratio)
        n_rows, n_active, *sums = ranks.sum(torch.tensor(own, dtype=torch.float64)).tolist()
        merged.n_rows, merged.n_active = int(n_rows), int(n_active)
        merged._squares, merged._squared_error, merged._cosine, merged._l2_ratio = sums
        merged._mean = ranks.sum(self._mean * self.n_rows) / max(n_rows, 1)
        scatter = self._scatter + self.n_rows * (self._mean - merged._mean).square().sum()
        merged._scatter = float(ranks.sum(scatter.reshape(1)))
        merged.fired = ranks.sum(self.fired.clone())
        return merged

    def densities(self) -> Tensor:
        """(F,) float64 firing rate of each latent."""
        return float64(self.fired) / max(self.n_rows, 1)

    def result(self) -> dict[str, float | None]:
        """Return the metrics by name.

        l0: mean active latents per row. fvu: sum|e|^2 / sum|x - mean|^2 and explained_variance = 1 - fvu; both None for
        rows without variance, such as a single one. mse: mean over rows of sum_d e^2. cosine, l2_ratio: mean over rows.
        rare: share of latents that fire on less than `dead_threshold` of the rows; never_fired: on none.
        """
        n = max(self.n_rows, 1)
        densities = self.densities()
        varies = self._scatter > NO_VARIANCE * self._squares
        fvu = self._squared_error / self._scatter if varies else None
        return {
            "l0": self.n_active / n,
            "fvu": fvu,
            "explained_variance": None if fvu is None else 1.0 - fvu,
            "mse": self._squared_error / n,
            "cosine": self._cosine / n,
            "l2_ratio": self._l2_ratio / n,
            "rare": float(float64(densities < self.dead_threshold).mean()),
            "never_fired": float(float64(densities == 0).mean()),
        }


@torch.no_grad()
def decoder_max_cosine(W_dec: Tensor, chunk: int = 2048) -> float:
    """Mean over latents of the largest |cosine| to another decoder row of W_dec (F, D); lower is better."""
    if W_dec.shape[0] < 2:
        return 0.0
    rows = W_dec / W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
    total = 0.0
    for start in range(0, rows.shape[0], chunk):
        cosines = (rows[start : start + chunk] @ rows.t()).abs()
        own = torch.arange(cosines.shape[0], device=rows.device)
        cosines[own, own + start] = 0.0
        total += float(float64(cosines.max(dim=1).values).sum())
    return total / int(rows.shape[0])
