"""cfg.json as SAELens 6 writes and reads it, and its conventions mapped to ours.

A variant that SAELens can express says so in its own file:

    saelens.express(TopKSAE, "topk", fields=lambda sae: {"k": sae.config.k}, options=lambda cfg: {"k": int(cfg["k"])})
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sae_granary.sae_core import registry
from sae_granary.sae_core.base import SAE
from sae_granary.sae_core.errors import NotAnSAEError
from sae_granary.sae_core.files.disk import read_json, read_tensors
from sae_granary.sae_core.files.fold import Folded

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SAELENS_VERSION = "6.54.12"  # the release whose files these are; under 6, its loader drops all metadata
NORMALIZATIONS = {"none": "none", "layer_norm": "unit_norm"}

Fields = Callable[[Any], Mapping[str, Any]]
Options = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class Architecture(NamedTuple):
    """How SAELens calls what a variant computes in inference."""

    name: str
    fields: Fields  # SAE -> entries of cfg.json that only this architecture has
    options: Options | None  # cfg.json -> options of the variant; None: other variants are read from these files


_ARCHITECTURES: dict[type[SAE], Architecture] = {}


def express(cls: type[SAE], name: str, *, fields: Fields = lambda sae: {}, options: Options | None = None) -> None:
    """Say that SAELens' architecture `name` computes the inference of a variant; its subclasses compute another.

    `options` makes the variant the one that files of this architecture are loaded as.
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
        "d_sae": sae.core.config.d_sae,
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
    architecture = cfg.get("architecture")
    if architecture not in readers:
        known = ", ".join(sorted(readers))
        raise NotAnSAEError(f"{folder}: architecture {architecture!r} of cfg.json cannot be read; known: {known}")
    normalization = cfg.get("normalize_activations", "none")
    if normalization not in NORMALIZATIONS:
        raise NotAnSAEError(
            f"{folder}: normalize_activations={normalization!r} cannot be read; expected one of "
            f"{', '.join(NORMALIZATIONS)} (SAELens folds the others with fold_activation_norm_scaling_factor)"
        )
    cls, options = readers[architecture]
    try:
        shared = {"d_in": int(cfg["d_in"]), "d_sae": int(cfg["d_sae"]), "normalize": NORMALIZATIONS[normalization]}
        assert options is not None
        config = registry.make_config(cls, {**shared, **options(cfg)})
        return Folded(cls, config, _our_conventions(cfg, tensors), {})
    except (KeyError, TypeError, ValueError) as error:
        raise NotAnSAEError(
            f"{folder}: cfg.json and sae_weights.safetensors do not describe an SAE: {error!r}"
        ) from error


def _current(cfg: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A cfg.json from before SAELens 6 in the words of today; top-k was an activation of the standard SAE then."""
    new = {"architecture": "standard", **cfg}
    activation = new.get("activation_fn", new.get("activation_fn_str", "relu"))
    if activation == "topk":
        new |= {"architecture": "topk", "k": (new.get("activation_fn_kwargs") or {}).get("k")}
    elif activation != "relu":
        raise NotAnSAEError(f"{folder}: activation_fn={activation!r} of cfg.json cannot be read; known: relu, topk")
    if new.get("finetuning_scaling_factor"):
        raise NotAnSAEError(f"{folder}: finetuning_scaling_factor of cfg.json cannot be read; fold it in with SAELens")
    if new.get("normalize_activations") in (None, False):
        new["normalize_activations"] = "none"
    return new


def _our_conventions(cfg: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """b_dec is subtracted from the input here always; decoder norms are in the weights, not in the activations."""
    if not cfg.get("apply_b_dec_to_input", True):
        shift = tensors["b_dec"] @ tensors["W_enc"]
        for name in ("b_enc", "b_gate"):
            if name in tensors:
                tensors[name] = tensors[name] + shift
        if "b_mag" in tensors:  # the magnitudes are of exp(r_mag) times the same product
            tensors["b_mag"] = tensors["b_mag"] + tensors["r_mag"].exp() * shift
    if cfg.get("rescale_acts_by_decoder_norm", False):
        norms = tensors["W_dec"].norm(dim=1)
        tensors["W_enc"] = tensors["W_enc"] * norms
        tensors["b_enc"] = tensors["b_enc"] * norms
        tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
    return tensors
