"""Give dead latents new directions (Anthropic, "Towards Monosemanticity", October 2023, neuron resampling)."""

import torch
from torch import Tensor

from sae_granary.sae_core.base import SAE, Inputs

ENCODER_SHARE = 0.2  # of the mean norm of living latents' encoder rows: a new latent fires rarely at first


@torch.no_grad()
def row_losses(sae: SAE, x: Inputs) -> Tensor:
    """(N,) squared error of raw rows in the normalised space."""
    out = sae(x)
    losses: Tensor = (out.source.target - out.recon).square().sum(1)
    return losses


@torch.no_grad()
def resample(sae: SAE, latents: Tensor, x: Inputs) -> None:
    """Point latents (n,) at raw rows x, one each: decoder rows of unit norm, short encoder rows, no bias, alive."""
    source, core = sae.prepare(x), sae.core
    target = source.target - core.b_dec
    core.W_dec[latents] = target / target.norm(dim=1, keepdim=True).clamp_min(1e-12)
    if core.has_encoder:
        alive = torch.ones(core.config.d_sae, dtype=torch.bool, device=latents.device)
        alive[latents] = False
        norms = core.W_enc.norm(dim=0)
        length = ENCODER_SHARE * (norms[alive].mean() if bool(alive.any()) else norms.mean())
        h = sae.centre(source.input)
        core.W_enc[:, latents] = (h / h.norm(dim=1, keepdim=True).clamp_min(1e-12)).t() * length
    core.reset_latents(latents)
    core.num_tokens_since_fired[latents] = 0


def latent_axes(sae: SAE) -> dict[str, int]:
    """Which axis of a parameter counts latents, by the parameter's name; those without one are left out."""
    core, axes = sae.core, {}
    names = {parameter: name for name, parameter in sae.named_parameters()}
    for own, parameter in core.named_parameters():
        if own in ("W_enc", "W_dec"):
            axes[names[parameter]] = 1 if own == "W_enc" else 0
        elif own != "b_dec" and parameter.shape == (core.config.d_sae,):
            axes[names[parameter]] = 0
    return axes
