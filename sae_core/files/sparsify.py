"""cfg.json and sae.safetensors as sparsify 1.3 writes and reads them, and its conventions mapped to ours.

A variant that sparsify can express says so in its own file: `sparsify.express(TopKSAE, transcode=False)`.
Shapes: D = d_in, F = d_sae. sparsify's encoder.weight is (F, D) and its W_skip (D, D) is applied as x @ W_skip.T.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_granary.sae_core import registry
from sae_granary.sae_core.base import SAE
from sae_granary.sae_core.errors import NotAnSAEError, OptionError
from sae_granary.sae_core.files.disk import read_json, read_tensors, write_json, write_tensors
from sae_granary.sae_core.files.fold import Folded, fold

CFG, WEIGHTS = "cfg.json", "sae.safetensors"
FLAGS = ("transcode", "skip_connection")
DEFAULT_EXPANSION = 32

_VARIANTS: dict[tuple[bool, bool], type[SAE]] = {}  # by FLAGS


def express(cls: type[SAE], *, transcode: bool) -> None:
    """Say that a variant computes sparsify's per-row top-k, and with linear paths its skip connection."""
    _VARIANTS[transcode, bool(cls.linear_paths)] = cls


def save_sparsify(sae: SAE, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the inference form that sparsify reads with `SparseCoder.load_from_disk`.

    Raises OptionError if sparsify cannot express the variant: it knows per-row top-k, also as a transcoder.
    """
    folder = Path(folder)
    cfg, folded = sparsify_config(sae, metadata or {}), fold(sae)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "encoder.weight": folded.weights["W_enc"].t(),
        "encoder.bias": folded.weights["b_enc"],
        "W_dec": folded.weights["W_dec"],
        "b_dec": folded.weights["b_dec"],
        **{name: tensor.t() for name, tensor in folded.extra.items()},
    }
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / CFG, cfg)


def sparsify_config(sae: SAE, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return cfg.json for the folded weights of an SAE; sparsify ignores the metadata.

    Raises OptionError for what sparsify cannot express.
    """
    flags = {cls: flags for flags, cls in _VARIANTS.items()}.get(type(sae))
    if flags is None:
        raise OptionError(
            f"type={sae.type_name!r} cannot be written for sparsify, which keeps the k largest per row; "
            f"it reads {', '.join(cls.type_name for cls in _VARIANTS.values())}: export to saelens instead"
        )
    if sae.normalizer.per_row:
        raise OptionError("normalize='unit_norm' cannot be written for sparsify, which does not normalize rows")
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


def read(folder: Path) -> Folded | None:
    """Return the SAE of a sparsify folder; None for another folder.

    Raises NotAnSAEError for what has no counterpart, and for damaged files.
    """
    if not ((folder / CFG).is_file() and (folder / WEIGHTS).is_file()):
        return None
    tensors, cfg = read_tensors(folder / WEIGHTS), read_json(folder / CFG)
    if (activation := cfg.get("activation", "topk")) != "topk":
        raise NotAnSAEError(f"{folder}: activation={activation!r} of cfg.json cannot be read; known: topk")
    registry.discover()
    transcode, skip = (bool(cfg.get(flag, False)) for flag in FLAGS)
    cls = _VARIANTS.get((transcode, skip))
    if cls is None:
        raise NotAnSAEError(f"{folder}: skip_connection without transcode has no counterpart here")
    try:
        return Folded(cls, registry.make_config(cls, _options(cfg)), *_our_tensors(tensors, skip=skip))
    except (KeyError, TypeError, ValueError) as error:
        raise NotAnSAEError(f"{folder}: cfg.json and {WEIGHTS} do not describe a sparse coder: {error!r}") from error


def _options(cfg: Mapping[str, Any]) -> dict[str, Any]:
    d_in = int(cfg["d_in"])
    d_sae = int(cfg.get("num_latents") or d_in * int(cfg.get("expansion_factor", DEFAULT_EXPANSION)))
    return {"d_in": d_in, "d_sae": d_sae, "k": int(cfg["k"]), "normalize": "none"}


def _our_tensors(tensors: Mapping[str, Tensor], *, skip: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights, and the skip path."""
    weights = {"W_enc": tensors["encoder.weight"].t(), "b_enc": tensors["encoder.bias"]}
    weights |= {name: tensors[name] for name in ("W_dec", "b_dec")}
    return weights, {"W_skip": tensors["W_skip"].t()} if skip else {}
