"""Reconstruction losses, their scale, and AuxK, the loss that revives dead latents.

Shapes: N rows, D = d_out, F = d_sae, A dead latents.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_granary.sae_core.autograd import Centered, decode, encode_at, take_latents
from sae_granary.sae_core.codes import Codes, Pattern
from sae_granary.sae_core.functional import MAX_SPARSE_DENSITY
from sae_granary.sae_core.kernels.deferred import current, host_waits, known_count
from sae_granary.sae_core.options import LM_LOSSES
from sae_granary.sae_core.pre_acts import MAX_DENSE, PreActs
from sae_granary.sae_core.ranks.reduce import ALONE, Alone
from sae_granary.sae_core.ranks.sharded import kept_of_rows, sum_values, topk


@dataclass(frozen=True, eq=False)
class LossScale:
    """Divisors of squared errors in the normalized space; penalties use the same scale."""

    loss: str  # the option, one of LOSSES
    variance: Tensor  # V = E|x - mean|^2 of the target
    mean_square: Tensor  # E|x|^2 of the target

    @property
    def name(self) -> str:
        """Name of the reconstruction loss; fvu for losses through a language model."""
        return "fvu" if self.loss in LM_LOSSES else self.loss

    @property
    def unit(self) -> Tensor:
        """Divisor of a squared error summed over D: V (fvu), E
        x
        ^2 (nmse) or 1 (mse).
        """
        if self.name == "fvu":
            return self.variance
        return self.mean_square if self.name == "nmse" else torch.ones_like(self.variance)

    @property
    def fvu_unit(self) -> Tensor:
        """Factor of a dimensionless term such as AuxK: V (mse) or 1."""
        return self.variance if self.loss == "mse" else torch.ones_like(self.variance)

    def reconstruction(self, recon: Tensor, target: Tensor) -> Tensor:
        """Mean over rows of |target - recon|^2, divided by V (fvu), by each row's |x|^2 (nmse) or by nothing (mse)."""
        if self.name == "nmse":
            return self.mean_error((target - recon).square().sum(-1), target)
        return F.mse_loss(recon, target, reduction="sum") / (self.unit * len(target))

    def mean_error(self, errors: Tensor, target: Tensor) -> Tensor:
        """Mean over rows of squared errors (N,), divided as `reconstruction` does; target (N, D)."""
        if self.name == "nmse":
            return (errors / target.square().sum(-1).clamp_min(1e-12)).mean()
        return errors.mean() / self.unit


class Dictionary(NamedTuple):
    """The weights of F latents."""

    W_enc: Tensor  # (D, F)
    b_enc: Tensor  # (F,)
    W_dec: Tensor  # (F, D_out)

    def take(self, latents: Tensor) -> "Dictionary":
        """The weights of some latents (A,)."""
        W_enc = take_latents(self.W_enc, latents, axis=1).t()
        return Dictionary(W_enc, take_latents(self.b_enc, latents), take_latents(self.W_dec, latents))


def dead_latents(sae: Any) -> Tensor:
    """Ascending indices (A,) of the latents in an SAE's `dead_mask`; in a training step, of those before it."""
    deferred = current()
    return _dead_now(sae) if deferred is None else deferred.once("dead", lambda: _dead_now(sae))


def _dead_now(sae: Any) -> Tensor:
    counters = sae.core.num_tokens_since_fired
    n_dead = known_count("dead", counters)
    if n_dead is None or not host_waits(counters):
        return sae.dead_mask.nonzero().squeeze(1)  # type: ignore[no-any-return]
    if n_dead == 0:
        return torch.empty(0, dtype=torch.int64, device=counters.device)
    return sae.dead_mask.logical_not().to(torch.uint8).argsort(stable=True)[:n_dead]  # type: ignore[no-any-return]


def auxk_loss(
    error: Tensor,
    pre_acts: PreActs,
    weights: Dictionary,
    latents: Tensor,
    k_aux: int,
    *,
    signed: bool = False,
    ranks: Alone = ALONE,
    shards: Alone = ALONE,
) -> Tensor:
    """AuxK (arXiv 2406.04093, appendix A.2): |error - error_hat|^2 / variance(error) * min(A / k_aux, 1), a scalar.

    The k_aux dead latents with the largest ReLU'd pre-activations of each row (of signed codes: with the largest
    magnitudes, and no ReLU) reconstruct the error (N, D_out), given without gradients, without a bias.
    pre_acts (N, F) of the SAE's rows; latents (A,) the dead ones, at least one. The variance is that of the rows of all
    ranks. Where `shards` divide the latents, A counts the dead ones of all, of which this rank may have none.
    The gradient reaches the encoder and decoder rows of the chosen dead latents and nothing else.
    """
    n_dead = latents.numel() if shards.n == 1 else int(shards.sum(torch.tensor(latents.numel())))
    own = weights.take(latents)
    k = min(k_aux, n_dead)
    if host_waits(error) and k <= MAX_SPARSE_DENSITY * n_dead and len(error) * len(latents) > MAX_DENSE:
        own_acts = PreActs(pre_acts.rows, own.W_enc, own.b_enc)  # which never holds the (N, A) matrix
        kept = own_acts.topk(k, by_magnitude=signed) if shards.n == 1 else topk(own_acts, k, shards)
        chosen = _Chosen(kept, None)
    else:
        chosen = _choose(pre_acts.columns(latents), k, n_dead, shards, signed=signed)
    acts = encode_at(Centered(pre_acts.rows), own.W_enc, own.b_enc, chosen.kept)
    acts = acts if signed else torch.relu(acts)
    codes = Codes(acts if chosen.mask is None else acts * chosen.mask, chosen.kept.pattern)
    squared = (error - sum_values(decode(codes, own.W_dec), shards)).square().sum(-1).mean()
    variance = _variance(error, ranks)
    # A perfect reconstruction leaves nothing to explain: the term is then zero, not 0/0.
    per_variance = torch.where(variance > 0, 1.0 / variance, 0.0)
    return squared * per_variance * min(n_dead / k_aux, 1.0)


def _variance(error: Tensor, ranks: Alone) -> Tensor:
    if ranks.n == 1:
        return (error - error.mean(0)).square().sum(-1).mean()
    sums = ranks.sum(torch.cat([error.sum(0), error.new_tensor([len(error)])]))
    n_rows = sums[-1]
    return ranks.sum((error - sums[:-1] / n_rows).square().sum()) / n_rows


class _Chosen(NamedTuple):
    kept: Codes  # pre-activations without gradients
    mask: Tensor | None  # which of the pattern's are meant, shaped as its values; None: all that are kept


def _choose(pre_acts: Tensor, k: int, n_dead: int, shards: Alone, *, signed: bool) -> _Chosen:
    """The k strongest of each row over all shards, of n_dead in all, as far as they are among this one's (N, A).

    A full pattern where k is too large a share of A for sparse products.
    """
    n_rows, n_own = pre_acts.shape
    everything = Codes(pre_acts, Pattern(n_rows, n_own))
    if k == n_dead:
        return _Chosen(everything, None)
    values, indices = (pre_acts.abs() if signed else pre_acts).topk(min(k, n_own), dim=-1, sorted=shards.n > 1)
    if shards.n > 1:
        mask = kept_of_rows(values, k, shards).to(values.dtype)
        return _Chosen(Codes(pre_acts.gather(1, indices).view(-1), Pattern.fixed_k(indices, n_own)), mask.view(-1))
    if k > MAX_SPARSE_DENSITY * n_dead:
        return _Chosen(everything, torch.zeros_like(pre_acts).scatter_(1, indices, 1.0))
    return _Chosen(Codes(pre_acts.gather(1, indices).view(-1), Pattern.fixed_k(indices, n_dead)), None)
