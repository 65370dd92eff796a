"""Fold the normalisation into the weights: raw rows in, raw rows out; and back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sae_granary.sae_core.base import SAE


@torch.no_grad()
def folded_tensors(sae: SAE) -> dict[str, Tensor]:
    """Return W_enc, W_dec, b_dec and the latents' tensors of the same function on raw rows.

    With (x - m_in) * s_in in front and y / s_out + m_out behind, x_hat stays equal for W_enc * s_in, W_dec / s_out,
    b_dec / s_out + m_out, and b - (m_in * s_in) @ W_enc where b_dec is not subtracted from the input. Then each latent
    is scaled by its decoder norm r (one r for all in variants with unit rows): W_enc * r, b * r, W_dec / r.
    """
    scale_in, mean_in = sae.input_scaling()
    scale_out, mean_out = sae.output_scaling()
    W_dec = sae.W_dec / scale_out
    if sae.unit_decoder:
        norms = W_dec.norm(dim=1).mean().expand(W_dec.shape[0])
    else:
        norms = W_dec.norm(dim=1).clamp_min(1e-12)
    tensors = {"W_dec": W_dec / norms[:, None], "b_dec": sae.output_bias() / scale_out + mean_out}
    latents = dict(sae.latent_tensors())
    if sae.has_encoder:
        tensors["W_enc"] = sae.W_enc * scale_in[:, None] * norms
        if not sae.subtracts_b_dec:
            latents["b_enc"] = latents["b_enc"] - (mean_in * scale_in) @ sae.W_enc
    for name, tensor in latents.items():
        tensors[name] = tensor if name in sae.unscaled_latent_tensors else tensor * norms
    return tensors


@torch.no_grad()
def unfold(sae: SAE, tensors: Mapping[str, Tensor]) -> None:
    """Set the weights of an SAE, whose normalisation is fitted, to compute what `folded_tensors` describes.

    The decoder rows get a mean norm of 1. Extra tensors must be set before: they shift what b_dec means.
    """
    scale_in, mean_in = sae.input_scaling()
    scale_out, mean_out = sae.output_scaling()
    W_dec = tensors["W_dec"] * scale_out
    norm = W_dec.norm(dim=1).mean().clamp_min(1e-12)
    sae.W_dec.copy_(W_dec / norm)
    sae.b_dec.copy_((tensors["b_dec"] - mean_out) * scale_out + sae.b_dec - sae.output_bias())
    own = sae.latent_tensors()
    latents = {name: tensors[name] * (1.0 if name in sae.unscaled_latent_tensors else norm) for name in own}
    if sae.has_encoder:
        sae.W_enc.copy_(tensors["W_enc"] / scale_in[:, None] * norm)
        if not sae.subtracts_b_dec:
            latents["b_enc"] = latents["b_enc"] + (mean_in * scale_in) @ sae.W_enc
    sae.set_latent_tensors(latents)
