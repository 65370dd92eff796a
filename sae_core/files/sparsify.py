"""cfg.json and sae.safetensors as sparsify 1.3 writes and reads them, and its conventions mapped to ours.

A variant that sparsify can express says so in its own file: `sparsify.express(TopKSAE, transcode=False)`.
Shapes: D = d_in, F = d_sae. sparsify's encoder.weight is (F, D) and its W_skip (D, D) is applied as x @ W_skip.T.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sae_granary.common.errors import one_line
from sae_granary.common.signed import short
from sae_granary.sae_core import registry
from sae_granary.sae_core.base import SAE
from sae_granary.sae_core.errors import NotAnSAEError, OptionError
from sae_granary.sae_core.files.disk import check_tensors, entry, read_json, read_tensors, write_json, write_tensors
from sae_granary.sae_core.files.fold import Folded, fold
from sae_granary.sae_core.files.record import DAMAGED
from sae_granary.sae_core.options import SharedConfig

CFG, WEIGHTS = "cfg.json", "sae.safetensors"
DEFAULT_EXPANSION = 32


class Kind(NamedTuple):
    """The entries of cfg.json that decide what is computed."""

    transcode: bool
    skip_connection: bool
    signed: bool = False  # the largest magnitudes, with their sign: until sparsify 1.2


_VARIANTS: dict[Kind, type[SAE]] = {}


def express(cls: type[SAE], *, transcode: bool, signed: bool = False) -> None:
    """Declare that a variant computes sparsify's per-row top-k and, with linear paths, its skip connection.

    `signed` coders, which sparsify no longer has, are only read.
    """
    _VARIANTS[Kind(transcode, bool(cls.linear_paths), signed)] = cls


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
    kinds = {cls: kind for kind, cls in _VARIANTS.items() if not kind.signed}
    kind = kinds.get(type(sae))
    if kind is None:
        raise OptionError(
            f"type={sae.type_name!r} cannot be written for sparsify, which keeps the k largest per row; "
            f"it reads {', '.join(cls.type_name for cls in kinds)}: export to saelens instead"
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
        "skip_connection": kind.skip_connection,
        "transcode": kind.transcode,
    }


def read(folder: Path) -> Folded | None:
    """Return the SAE of a sparsify folder; None for another folder.

    Raises NotAnSAEError for what has no counterpart, and for damaged files.
    """
    if not ((folder / CFG).is_file() and (folder / WEIGHTS).is_file()):
        return None
    tensors, cfg = read_tensors(folder / WEIGHTS), read_json(folder / CFG)
    if (activation := cfg.get("activation", "topk")) != "topk":
        raise NotAnSAEError(f"{folder}: activation={short(activation)} of cfg.json cannot be read; known: topk")
    registry.discover()
    try:
        flags = {name: entry(cfg, name, bool, False) for name in Kind._fields}
        cls = _VARIANTS.get(Kind(**flags))
        if cls is None:
            raise NotAnSAEError("skip_connection without transcode, and signed with either, have no counterpart here")
        config = registry.make_config(cls, _options(cfg))
        return Folded(cls, config, *_our_tensors(tensors, config, skip=flags["skip_connection"]))
    except DAMAGED as error:
        raise NotAnSAEError(
            f"{folder}: cfg.json and {WEIGHTS} do not describe a sparse coder: {one_line(error)}"
        ) from error


def _options(cfg: Mapping[str, Any]) -> dict[str, Any]:
    d_in, d_sae = entry(cfg, "d_in", int), entry(cfg, "num_latents", int, 0)
    d_sae = d_sae or d_in * entry(cfg, "expansion_factor", int, DEFAULT_EXPANSION)
    return {"d_in": d_in, "d_sae": d_sae, "k": entry(cfg, "k", int), "normalize": "none"}


def _our_tensors(
    tensors: Mapping[str, Tensor], config: SharedConfig, *, skip: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights, and the skip path."""
    D, F = config.d_in, config.d_sae
    shapes = {"encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)}
    tensors = check_tensors(tensors, {**shapes, **({"W_skip": (D, D)} if skip else {})})
    weights = {"W_enc": tensors["encoder.weight"].t(), "b_enc": tensors["encoder.bias"]}
    weights |= {name: tensors[name] for name in ("W_dec", "b_dec")}
    return weights, {"W_skip": tensors["W_skip"].t()} if skip else {}
