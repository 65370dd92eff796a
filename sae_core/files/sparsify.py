"""cfg.json and sae.safetensors as sparsify 1.3 writes and reads them, and its conventions mapped to ours.

Shapes: D = d_in, F = d_sae. sparsify's encoder.weight is (F, D) and its W_skip (D, D) is applied as x @ W_skip.T.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_granary.sae_core import registry
from sae_granary.sae_core.base import SAE
from sae_granary.sae_core.errors import NotAnSAEError, OptionError
from sae_granary.sae_core.files.fold import folded_tensors

WEIGHTS = "sae.safetensors"
FLAGS = ("transcode", "skip_connection")
DEFAULT_EXPANSION = 32


def sparsify_config(sae: SAE, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return cfg.json for the folded weights of an SAE; sparsify ignores the metadata.

    Raises OptionError for what sparsify cannot express.
    """
    flags = _flags(type(sae))
    if flags is None:
        raise OptionError(
            f"type={sae.type_name!r} cannot be written for sparsify, which keeps the k largest per row; "
            f"it reads {', '.join(cls.type_name for cls in _readable().values())}: export to saelens instead"
        )
    if sae.normalizer.per_row:
        raise OptionError("normalize='unit_norm' cannot be written for sparsify, which does not normalise rows")
    if sae.d_out != sae.config.d_in:
        raise OptionError(f"d_out={sae.d_out} cannot be written for sparsify: expected d_in={sae.config.d_in}")
    return {
        "activation": "topk",
        "d_in": sae.config.d_in,
        "expansion_factor": max(1, sae.config.d_sae // sae.config.d_in),
        "k": sae.config.k,  # type: ignore[attr-defined]
        "metadata": dict(metadata),
        "multi_topk": False,
        "normalize_decoder": True,
        "num_latents": sae.config.d_sae,
        **dict(zip(FLAGS, flags, strict=True)),
    }


def sparsify_tensors(sae: SAE) -> dict[str, Tensor]:
    """Return the folded weights by sparsify's names."""
    tensors = folded_tensors(sae)
    named = {
        "encoder.weight": tensors["W_enc"].t(),
        "encoder.bias": tensors["b_enc"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    return named | {name: tensor.t() for name, tensor in sae.extra_tensors().items()}


def read_sparsify(
    cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[type[SAE], dict[str, Any], dict[str, Tensor]]:
    """Return the class, the options and the tensors of a sparsify folder, in our conventions.

    Raises NotAnSAEError for what has no counterpart.
    """
    if (activation := cfg.get("activation", "topk")) != "topk":
        raise NotAnSAEError(f"{folder}: activation={activation!r} of cfg.json cannot be read; known: topk")
    transcode, skip = (bool(cfg.get(flag, False)) for flag in FLAGS)
    readable = _readable()
    if (transcode, skip) not in readable:
        raise NotAnSAEError(f"{folder}: skip_connection without transcode has no counterpart here")
    try:
        d_in = int(cfg["d_in"])
        d_sae = int(cfg.get("num_latents") or d_in * int(cfg.get("expansion_factor", DEFAULT_EXPANSION)))
        options = {"d_in": d_in, "d_sae": d_sae, "k": int(cfg["k"]), "normalize": "none"}
        ours = {"W_enc": tensors["encoder.weight"].t(), "b_enc": tensors["encoder.bias"], "b_dec": tensors["b_dec"]}
        ours["W_dec"] = tensors["W_dec"]
        if skip:
            ours["W_skip"] = tensors["W_skip"].t()
    except (KeyError, TypeError, ValueError) as error:
        raise NotAnSAEError(f"{folder}: cfg.json and {WEIGHTS} do not describe a sparse coder: {error!r}") from error
    return readable[transcode, skip], options, ours


def _readable() -> dict[tuple[bool, bool], type[SAE]]:
    """The variants by what sparsify calls them."""
    variants = (registry.get(name) for name in registry.names())
    return {flags: cls for cls in variants if (flags := _flags(cls)) is not None}


def _flags(cls: type[SAE]) -> tuple[bool, bool] | None:
    """What a class says of itself: its subclasses compute something else."""
    flags: tuple[bool, bool] | None = vars(cls).get("sparsify_flags")
    return flags
