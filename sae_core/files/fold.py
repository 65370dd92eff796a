"""The inference form: an SAE whose normalization is folded into its weights; and the inverse.

Everything follows from a variant's declarations: its per-latent numbers and their units, its linear paths, its options
in units of pre-activations. Any other parameter is saved unchanged.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae_granary.sae_core.base import SAE
from sae_granary.sae_core.files.disk import check_size, check_tensors
from sae_granary.sae_core.latents import latent_numbers
from sae_granary.sae_core.options import PRE_ACTS, SharedConfig, in_pre_acts


class Folded(NamedTuple):
    """An SAE of raw rows, as files of every format store it."""

    cls: type[SAE]
    config: SharedConfig
    weights: Mapping[str, Tensor]  # W_enc, W_dec, b_dec and the latents' numbers
    extra: Mapping[str, Tensor]  # all other parameters

    def build(self) -> SAE:
        """Create the SAE. Raises NotAnSAEError for tensors of other names, shapes or dtypes, and for NaN and Inf."""
        check_size(self.config, [*self.weights.values(), *self.extra.values()])
        sae = self.cls(self.config)
        extra = {name: parameter for name, parameter, _ in _extra_parameters(sae)}
        weights = check_tensors(self.weights, shapes_of(sae.core))
        others = check_tensors(self.extra, {name: parameter.shape for name, parameter in extra.items()})
        with torch.no_grad():
            _assign(sae.core, weights)
            for name, parameter in extra.items():
                parameter.copy_(others[name])
        return sae


@torch.no_grad()
def fold(sae: SAE) -> Folded:
    """Return the same function of raw rows.

    With (x - m_in) * s_in in front and y / s_out + m_out behind, x_hat stays equal for W_enc * s_in, W_dec / s_out,
    b_dec / s_out + m_out, and b - (m_in * s_in) @ W_enc where b_dec is not subtracted from the input. Then each latent
    is scaled by its decoder norm r (one r for all in variants with unit rows): W_enc * r, W_dec / r, and all that is in
    units of pre-activations * r.
    """
    core = sae.core
    (scale_in, _), (scale_out, mean_out) = core.scalings()
    W_dec: Tensor = core.W_dec / scale_out
    norms = _latent_scales(core, W_dec)
    weights = {"W_dec": W_dec / norms[:, None], "b_dec": _output_bias(core) / scale_out + mean_out}
    latents = latent_numbers(core)
    if core.has_encoder:
        weights["W_enc"] = core.W_enc * scale_in[:, None] * norms
        if (shift := _encoder_shift(core)) is not None:
            bias = next(iter(latents))
            latents[bias] = latents[bias] - shift @ core.W_enc
    for name, numbers in latents.items():
        weights[name] = numbers * norms if core.latents[name].unit == PRE_ACTS else numbers
    extra = {}
    for name, parameter, is_path in _extra_parameters(sae):
        extra[name] = parameter.detach() * scale_in[:, None] / scale_out if is_path else parameter.detach()
    return Folded(type(sae), _inference_config(sae, norms), weights, extra)


@torch.no_grad()
def unfold(sae: SAE, folded: Folded) -> None:
    """Set the weights of an SAE, whose normalization is fitted, to compute what is folded.

    In variants with unit rows the norm of each decoder row moves into its encoder column: the same function, unless
    latents compete for a place (top-k), where from then on p_i |W_dec,i| is compared. In others the rows get a mean
    norm of 1.
    """
    core = sae.core
    (scale_in, _), (scale_out, mean_out) = core.scalings()
    for name, parameter, is_path in _extra_parameters(sae):
        parameter.copy_(folded.extra[name] / (scale_in[:, None] / scale_out) if is_path else folded.extra[name])
    W_dec = folded.weights["W_dec"] * scale_out
    norms: Tensor = W_dec.norm(dim=1)
    if core.unit_decoder:  # a row of zeros has no direction: the latent keeps its own, and never fires
        has_direction = (norms > 1e-12)[:, None]
        weights = {"W_dec": torch.where(has_direction, W_dec / norms.clamp_min(1e-12)[:, None], core.W_dec)}
    else:
        norms = norms.mean().clamp_min(1e-12).expand_as(norms)
        weights = {"W_dec": W_dec / norms[:, None]}
    weights["b_dec"] = (folded.weights["b_dec"] - mean_out) * scale_out + core.b_dec - _output_bias(core)
    for name, declared in core.latents.items():
        weights[name] = folded.weights[name] * (norms if declared.unit == PRE_ACTS else 1.0)
    if core.has_encoder:
        weights["W_enc"] = folded.weights["W_enc"] / scale_in[:, None] * norms
        if (shift := _encoder_shift(core)) is not None:
            bias = next(iter(core.latents))
            weights[bias] = weights[bias] + shift @ weights["W_enc"]
    _assign(core, weights)


def shapes_of(core: SAE) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that files hold, by name."""
    matrices = {name: tuple(getattr(core, name).shape) for name in _matrices(core)}
    return {**matrices, **dict.fromkeys(core.latents, (core.config.d_sae,))}


def _matrices(core: SAE) -> tuple[str, ...]:
    return ("W_enc", "W_dec", "b_dec") if core.has_encoder else ("W_dec", "b_dec")


def _assign(core: SAE, weights: Mapping[str, Tensor]) -> None:
    for name in _matrices(core):
        getattr(core, name).copy_(weights[name])
    for name, declared in core.latents.items():
        declared.write(getattr(core, name), weights[name])


def _latent_scales(core: SAE, W_dec: Tensor) -> Tensor:
    """Scale of each latent's pre-activations (F,), and W_dec (F, D_out) for raw rows."""
    norms: Tensor = W_dec.norm(dim=1)
    if core.unit_decoder:
        return core.shards.average(norms.mean()).expand_as(norms)
    # An option in units of pre-activations is one number for all latents: then no latent changes its unit.
    return torch.ones_like(norms) if in_pre_acts(core.config) else norms.clamp_min(1e-12)


def _output_bias(core: SAE) -> Tensor:
    """Bias (D_out,) of the decoder, minus the linear paths' output at the input's mean."""
    scale, mean = core.scalings()[0]
    bias: Tensor = core.b_dec
    for name in core.linear_paths:
        bias = bias - (mean * scale) @ getattr(core, name)
    return bias


def _encoder_shift(core: SAE) -> Tensor | None:
    """Shift (D,) of the encoder's input once the normalization is folded; the encoder bias absorbs it."""
    if core.subtracts_b_dec:
        return core.b_dec - _output_bias(core) if core.linear_paths else None
    scale, mean = core.scalings()[0]
    return mean * scale


def _extra_parameters(sae: SAE) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Return the linear paths (True) or the parameters without a declared kind (False)."""
    core = sae.core
    paths = {id(getattr(core, name)) for name in core.linear_paths}
    declared = ("W_enc", "W_dec", "b_dec", *core.latents)
    known = {id(p) for name, p in core.named_parameters() if name.partition(".")[0] in declared}
    for name, parameter in sae.named_parameters():
        if id(parameter) not in known:
            yield name, parameter, id(parameter) in paths


def _inference_config(sae: SAE, norms: Tensor) -> SharedConfig:
    """Config of the folded weights: normalization that is folded in is not applied again."""
    scaled = in_pre_acts(sae.config) if sae.core is sae else {}
    options = {name: value * float(norms[0]) for name, value in scaled.items()}
    return replace(sae.config, normalize="unit_norm" if sae.normalizer.per_row else "none", **options)  # type: ignore[arg-type]
