"""AuxK: dead latents reconstruct what the live ones left over (arXiv 2406.04093, appendix A.2).

Shapes: N rows, D = d_out, F = d_sae, A dead latents.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_core.autograd import decode
from sae_core.codes import Codes, Pattern

if TYPE_CHECKING:
    from sae_core.base import SAE


def auxk_loss(sae: "SAE", h: Tensor, error: Tensor, pre_acts: Tensor, dead: Tensor, k_aux: int) -> Tensor:
    """Return |error - error_hat|^2 / variance(error) * min(A / k_aux, 1), a scalar.

    The k_aux dead latents with the largest ReLU'd pre-activations of each row (of signed codes: with the largest
    magnitudes, and no ReLU) reconstruct the detached error (N, D) without a bias.
    h (N, D) are the centred rows without gradients; pre_acts (N, F); dead (F,) bool.
    The gradient reaches the encoder and decoder rows of the chosen dead latents and nothing else.
    """
    dead_latents = dead.nonzero().squeeze(1)
    n_dead = int(dead_latents.numel())
    k = min(k_aux, n_dead)
    candidates = pre_acts[:, dead_latents]
    strength = candidates.abs() if sae.signed_codes else candidates
    chosen = dead_latents[strength.topk(k, dim=-1, sorted=False).indices]
    pattern = Pattern.fixed_k(chosen, pre_acts.shape[1])
    acts = sae.encode_at(h, pre_acts, pattern)
    codes = Codes(acts if sae.signed_codes else torch.relu(acts), pattern)
    squared = (error - decode(codes, sae.W_dec)).square().sum(-1).mean()
    variance = (error - error.mean(0)).square().sum(-1).mean()
    # A perfect reconstruction leaves nothing to explain: the term is then zero, not 0/0.
    per_variance = torch.where(variance > 0, 1.0 / variance, 0.0)
    return squared * per_variance * min(n_dead / k_aux, 1.0)
