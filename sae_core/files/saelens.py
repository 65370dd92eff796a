"""cfg.json as SAELens 6 writes and reads it, and its conventions mapped to ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_granary.sae_core import registry
from sae_granary.sae_core.base import SAE
from sae_granary.sae_core.errors import NotAnSAEError

SAELENS_VERSION = "6.54.12"  # the release whose files these are; under 6, its loader drops all metadata
NORMALIZATIONS = {"none": "none", "layer_norm": "unit_norm"}


def saelens_config(sae: SAE, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return cfg.json for the folded weights of an SAE."""
    return {
        "architecture": own(type(sae.core), "saelens_architecture"),
        "d_in": sae.core.d_encoded,
        "d_sae": sae.core.config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm" if sae.normalizer.per_row else "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_VERSION, "sae_lens_training_version": None, **metadata},
        **sae.core.saelens_fields(),
    }


def read_saelens(
    cfg: Mapping[str, Any], tensors: dict[str, Tensor], folder: Path
) -> tuple[type[SAE], SAE.Config, dict[str, Tensor]]:
    """Return the class, Config and tensors of a SAELens folder, in our conventions.

    Raises NotAnSAEError for an architecture or a normalisation that has no counterpart.
    """
    cfg = _current(cfg, folder)
    architecture = cfg.get("architecture")
    variants = (registry.get(name) for name in registry.names())
    readers = {name: cls for cls in variants if (name := own(cls, "reads_saelens"))}
    if architecture not in readers:
        known = ", ".join(sorted(readers))
        raise NotAnSAEError(f"{folder}: architecture {architecture!r} of cfg.json cannot be read; known: {known}")
    normalization = cfg.get("normalize_activations", "none")
    if normalization not in NORMALIZATIONS:
        raise NotAnSAEError(
            f"{folder}: normalize_activations={normalization!r} cannot be read; expected one of "
            f"{', '.join(NORMALIZATIONS)} (SAELens folds the others with fold_activation_norm_scaling_factor)"
        )
    try:
        shared = {
            "d_in": int(cfg["d_in"]),
            "d_sae": int(cfg["d_sae"]),
            "normalize": NORMALIZATIONS[normalization],
        }
        cls = readers[architecture]
        return cls, cls.config_from_saelens(cfg, shared), _our_conventions(cfg, dict(tensors))
    except (KeyError, TypeError, ValueError) as error:
        raise NotAnSAEError(
            f"{folder}: cfg.json and sae_weights.safetensors do not describe an SAE: {error!r}"
        ) from error


def own(cls: type[SAE], attribute: str) -> str:
    """What a class itself says of SAELens, not what it inherits: a subclass computes something else."""
    return str(vars(cls).get(attribute, ""))


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
