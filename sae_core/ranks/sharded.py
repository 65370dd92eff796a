"""A topk SAE whose latents are divided over ranks, for dictionaries that one card cannot hold.

Every rank has all rows of a batch and F / n latents: their columns of W_enc, rows of W_dec, counters and optimizer
state. What the ranks exchange has the size of rows: the k largest pre-activations of each row (N, k), and the sum of
their reconstructions (N, D); no (N, F) matrix leaves a rank. Losses are the same on all ranks, and each rank gets the
gradients of its own latents; those of b_dec, which all have, are whole.

Shapes: N rows, D = d_in, F latents of all ranks, A dead latents of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from sae_granary.sae_core.autograd import Centered, center, decode, encode_at
from sae_granary.sae_core.codes import Codes, Pattern
from sae_granary.sae_core.data import SAEOutput
from sae_granary.sae_core.losses import Dictionary, dead_latents
from sae_granary.sae_core.options import Progress
from sae_granary.sae_core.pre_acts import PreActs
from sae_granary.sae_core.ranks.reduce import ALONE, Alone
from sae_granary.sae_core.variants.topk import TopKSAE


class ShardedTopKSAE(TopKSAE):
    """The latents of one rank of a topk SAE: `config.d_sae` of them, after those of lower ranks. Set `shards` to train.

    k and k_aux count latents of all ranks.
    """

    shards: Alone = ALONE

    def center(self, rows: Tensor) -> Centered:
        """Subtract the decoder bias, whose gradient from the encoder is the sum over the ranks' latents."""
        return center(rows, _sum_gradients(self.b_dec, self.shards))

    def select(self, pre_acts: PreActs, k: int) -> Codes:
        """This rank's part of the k largest of each row over all ranks."""
        values, indices = pre_acts.dense.topk(min(k, pre_acts.shape[1]), dim=1)
        kept = kept_of_rows(values, k, self.shards)
        rows = torch.arange(len(values), device=values.device)[:, None].expand_as(kept)[kept]
        return Codes(values[kept], Pattern.of_rows(rows, indices[kept], *pre_acts.shape))

    def reconstruct(self, codes: Codes) -> Tensor:
        """Decode in the normalized space: the sum of what the ranks decode."""
        return _sum_values(decode(codes, self.W_dec), self.shards) + self.b_dec

    def penalties(self, out: SAEOutput, progress: Progress) -> dict[str, Tensor]:
        """AuxK over the dead latents of all ranks."""
        latents = dead_latents(self)
        n_dead = int(self.shards.sum(torch.tensor(len(latents))))
        if not self.config.auxk_coef or not n_dead:
            return {}
        error = (out.source.target - out.recon).detach()
        k_aux = self.config.k_aux or max(1, self.d_out // 2)
        auxk = self._auxk(error, out.pre_acts, latents, n_dead, k_aux)
        return {"auxk": self.config.auxk_coef * auxk * self.loss_scale.fvu_unit}

    def _auxk(self, error: Tensor, pre_acts: PreActs, latents: Tensor, n_dead: int, k_aux: int) -> Tensor:
        """See `losses.auxk_loss`; latents (A,) are this rank's dead ones."""
        own = Dictionary(self.W_enc, self.encoder_bias, self.W_dec).take(latents)
        values, indices = pre_acts.columns(latents).topk(min(k_aux, len(latents)), dim=1)
        kept = kept_of_rows(values, min(k_aux, n_dead), self.shards)
        rows = torch.arange(len(values), device=values.device)[:, None].expand_as(kept)[kept]
        chosen = Codes(values[kept], Pattern.of_rows(rows, indices[kept], len(values), len(latents)))
        acts = torch.relu(encode_at(Centered(pre_acts.rows), own.W_enc, own.b_enc, chosen))
        error_hat = _sum_values(decode(Codes(acts, chosen.pattern), own.W_dec), self.shards)
        variance = (error - error.mean(0)).square().sum(-1).mean()
        per_variance = torch.where(variance > 0, 1.0 / variance, 0.0)
        return (error - error_hat).square().sum(-1).mean() * per_variance * min(n_dead / k_aux, 1.0)


def kept_of_rows(values: Tensor, k: int, shards: Alone) -> Tensor:
    """Mask (N, m) of a rank's values, descending in each row, that are among the k largest of the row over all ranks.

    Among equal values those of lower ranks win, which have the lower latents. Each rank sends k values per row.
    """
    n_rows, n_own = values.shape
    mine = torch.nn.functional.pad(values, (0, k - n_own), value=-torch.inf) if n_own < k else values
    parts = [part.view(n_rows, k) for part in shards.gather(mine.reshape(-1))]
    smallest = torch.cat(parts, dim=1).topk(k, dim=1).values[:, -1:]
    above = torch.stack([(part > smallest).sum(1) for part in parts])  # (n, N)
    equal = torch.stack([(part == smallest).sum(1) for part in parts])
    left = (k - above.sum(0) - equal[: shards.index].sum(0)).clamp_min(0)
    n_kept = above[shards.index] + torch.minimum(left, equal[shards.index])
    return torch.arange(n_own, device=values.device) < n_kept[:, None]


class _SumValues(Function):
    """The sum over the ranks; its gradient, the same on all ranks, is that of each part."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, shards: Alone) -> Tensor:
        return shards.sum(values.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _SumGradients(Function):
    """The same values on all ranks, whose gradients are added up."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, shards: Alone) -> Tensor:
        ctx.shards = shards
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.shards.sum(grad.clone()), None


def _sum_values(values: Tensor, shards: Alone) -> Tensor:
    return _SumValues.apply(values, shards)  # type: ignore[no-any-return, no-untyped-call]


def _sum_gradients(values: Tensor, shards: Alone) -> Tensor:
    return _SumGradients.apply(values, shards)  # type: ignore[no-any-return, no-untyped-call]
