"""cfg.json as SAELens 6 writes and reads it, and its conventions mapped to ours.

A variant that SAELens can express says so in its own file:

    fields = lambda sae: {"k": sae.config.k}
    saelens.express(TopKSAE, "topk", fields=fields, options=lambda cfg: {"k": entry(cfg, "k", int)})
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_granary.common.errors import one_line
from sae_granary.common.signed import short
from sae_granary.sae_core import registry
from sae_granary.sae_core.base import SAE
from sae_granary.sae_core.errors import NotAnSAEError
from sae_granary.sae_core.files.disk import check_tensors, entry, read_json, read_tensors
from sae_granary.sae_core.files.fold import Folded
from sae_granary.sae_core.files.record import DAMAGED

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SAELENS_VERSION = "6.54.12"  # the release whose files these are; under 6, its loader drops all metadata
NORMALIZATIONS = {"none": "none", "layer_norm": "unit_norm"}

Fields = Callable[[Any], Mapping[str, Any]]
Options = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class Architecture(NamedTuple):
    """How SAELens names what a variant computes in inference."""

    name: str
    fields: Fields  # SAE -> entries of cfg.json that only this architecture has
    options: Options | None  # cfg.json -> options of the variant; None: other variants are read from these files


_ARCHITECTURES: dict[type[SAE], Architecture] = {}


def express(cls: type[SAE], name: str, *, fields: Fields = lambda sae: {}, options: Options | None = None) -> None:
    """Declare that SAELens' architecture `name` computes the inference of a variant, but not of its subclasses.

    `options` makes the variant the one that files of this architecture load as.
    """
    _ARCHITECTURES[cls] = Architecture(name, fields, options)


def expresses(sae: SAE) -> bool:
    """Whether SAELens can load an SAE."""
    return type(sae.core) in _ARCHITECTURES


def saelens_config(sae: SAE, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return cfg.json for the folded weights of an SAE that SAELens expresses."""
    architecture = _ARCHITECTURES[type(sae.core)]
    return {
        "architecture": architecture.name,
        "d_in": sae.core.d_encoded,
        "d_sae": registry.whole_config(sae.core).d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm" if sae.normalizer.per_row else "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_VERSION, "sae_lens_training_version": None, **metadata},
        **architecture.fields(sae.core),
    }


def read(folder: Path) -> Folded | None:
    """Return the SAE of a SAELens folder; None for another folder.

    Raises NotAnSAEError for an architecture or a normalization that has no counterpart, and for damaged files.
    """
    if not (folder / CFG).is_file():
        return None
    cfg, tensors = _current(read_json(folder / CFG), folder), read_tensors(folder / WEIGHTS)
    registry.discover()
    readers = {a.name: (cls, a.options) for cls, a in _ARCHITECTURES.items() if a.options is not None}
    architecture = cfg["architecture"]
    if not isinstance(architecture, str) or architecture not in readers:
        known = ", ".join(sorted(readers))
        raise NotAnSAEError(f"{folder}: architecture {short(architecture)} of cfg.json cannot be read; known: {known}")
    normalization = cfg["normalize_activations"]
    if not isinstance(normalization, str) or normalization not in NORMALIZATIONS:
        raise NotAnSAEError(
            f"{folder}: normalize_activations={short(normalization)} cannot be read; expected one of "
            f"{', '.join(NORMALIZATIONS)} (SAELens folds the others with fold_activation_norm_scaling_factor)"
        )
    cls, options = readers[architecture]
    try:
        sizes = {name: entry(cfg, name, int) for name in ("d_in", "d_sae")}
        assert options is not None
        config = registry.make_config(cls, {**sizes, "normalize": NORMALIZATIONS[normalization], **options(cfg)})
        if "scaling_factor" in tensors and bool((tensors["scaling_factor"] == 1).all()):
            del tensors["scaling_factor"]  # SAELens wrote it to every folder for a while
        weights = check_tensors(tensors, _shapes(cls, **sizes))
        return Folded(cls, config, _our_conventions(cls, cfg, weights), {})
    except DAMAGED as error:
        raise NotAnSAEError(
            f"{folder}: cfg.json and sae_weights.safetensors do not describe an SAE: {one_line(error)}"
        ) from error


def _current(cfg: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A cfg.json from before SAELens 6 in today's terms, when top-k was an activation of the standard SAE."""
    new = {"architecture": "standard", **cfg}
    activation = new.get("activation_fn", new.get("activation_fn_str", "relu"))
    if activation == "topk":
        arguments = new.get("activation_fn_kwargs")
        new |= {"architecture": "topk", "k": arguments.get("k") if isinstance(arguments, dict) else None}
    elif activation != "relu":
        raise NotAnSAEError(
            f"{folder}: activation_fn={short(activation)} of cfg.json cannot be read; known: relu, topk"
        )
    if new.get("finetuning_scaling_factor"):
        raise NotAnSAEError(f"{folder}: finetuning_scaling_factor of cfg.json cannot be read; fold it in with SAELens")
    if new.get("normalize_activations") is None or new["normalize_activations"] is False:
        new["normalize_activations"] = "none"
    return new


def _shapes(cls: type[SAE], d_in: int, d_sae: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a folder by name: SAELens' names are those of ours."""
    encoder = {"W_enc": (d_in, d_sae)} if cls.has_encoder else {}
    return {**encoder, "W_dec": (d_sae, d_in), "b_dec": (d_in,), **dict.fromkeys(cls.latents, (d_sae,))}


def _our_conventions(cls: type[SAE], cfg: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adapt to our conventions: b_dec is always subtracted from the input, and decoder norms are in the weights."""
    if not cls.has_encoder and not bool(((tensors["W_dec"].norm(dim=1) - 1).abs() < 1e-3).all()):
        raise NotAnSAEError("decoder rows are not of norm 1, which a dictionary that is its own encoder needs here")
    if not entry(cfg, "apply_b_dec_to_input", bool, True):
        if not cls.has_encoder:  # a dictionary that is its own encoder adds b_dec where it was subtracted, or nowhere
            return {**tensors, "b_dec": torch.zeros_like(tensors["b_dec"])}
        shift = tensors["b_dec"] @ tensors["W_enc"]
        for name in ("b_enc", "b_gate"):
            if name in tensors:
                tensors[name] = tensors[name] + shift
        if "b_mag" in tensors:  # the magnitudes are of exp(r_mag) times the same product
            tensors["b_mag"] = tensors["b_mag"] + tensors["r_mag"].exp() * shift
    if "threshold" in tensors:  # SAELens' codes are ReLU(p) where p exceeds the threshold: never negative
        tensors["threshold"] = tensors["threshold"].clamp_min(0.0)
    if entry(cfg, "rescale_acts_by_decoder_norm", bool, False):
        norms = tensors["W_dec"].norm(dim=1)
        tensors["W_enc"] = tensors["W_enc"] * norms
        tensors["b_enc"] = tensors["b_enc"] * norms
        tensors["W_dec"] = tensors["W_dec"] / norms.clamp_min(1e-12)[:, None]
    return tensors
