"""Files of an SAE: the inference form that SAELens reads, and the native form that training continues from.

Inference form: cfg.json, sae_weights.safetensors (normalisation folded into the weights), granary.json (type, Config)
and, for what SAELens has no name for, granary.safetensors.
Native form: sae.json, sae.safetensors (weights and buffers as trained). Nothing is pickled.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sae_granary.common.errors import nearest
from sae_granary.sae_core import registry
from sae_granary.sae_core.base import SAE
from sae_granary.sae_core.errors import NotAnSAEError, OptionError, SAEError
from sae_granary.sae_core.files.fold import folded_tensors
from sae_granary.sae_core.files.saelens import own, read_saelens, saelens_config
from sae_granary.sae_core.files.sparsify import WEIGHTS as SPARSIFY_WEIGHTS
from sae_granary.sae_core.files.sparsify import read_sparsify, sparsify_config, sparsify_tensors

FORMAT = 1
WEIGHTS, CFG = "sae_weights.safetensors", "cfg.json"
OURS, EXTRA = "granary.json", "granary.safetensors"
NATIVE_WEIGHTS, NATIVE = "sae.safetensors", "sae.json"


def make_config(cls: type[SAE], options: Mapping[str, Any]) -> SAE.Config:
    """Build a variant's Config from a mapping.

    Raises OptionError for an unknown or missing option (with the nearest known one) or a value out of range.
    """
    known = {spec.name: spec for spec in dataclasses.fields(cls.Config)}
    for name in options:
        if name not in known:
            options_of = f"{cls.type_name} has no option {name!r} (its options: {', '.join(known)})"
            raise OptionError(f"{options_of}{nearest(name, known)}")
    for name, spec in known.items():
        if name not in options and spec.default is dataclasses.MISSING:
            raise OptionError(f"{cls.type_name} needs option {name!r}: {spec.metadata['help']}")
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
    return cls.Config(**values)


def save(sae: SAE, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> list[Path]:
    """Write the inference form and return its files; `metadata` (model_name, hook_name ...) goes into cfg.json.

    A variant that SAELens cannot express gets no cfg.json: its granary.json says all that `load` needs.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = dict(metadata or {})
    record = {"format": FORMAT, **describe(_inference_config(sae), sae), "metadata": metadata}
    files = [_write_tensors(folder / WEIGHTS, folded_tensors(sae.core))]
    if extra := sae.extra_tensors():
        files.append(_write_tensors(folder / EXTRA, extra))
    if own(type(sae.core), "saelens_architecture"):
        files.append(_write_json(folder / CFG, saelens_config(sae, metadata)))
    return [*files, _write_json(folder / OURS, record)]


def save_sparsify(sae: SAE, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the inference form that sparsify reads with `SparseCoder.load_from_disk`.

    Raises OptionError if sparsify cannot express the variant: it knows per-row top-k, also as a transcoder.
    """
    folder = Path(folder)
    cfg = sparsify_config(sae, metadata or {})
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder / SPARSIFY_WEIGHTS, sparsify_tensors(sae))
    _write_json(folder / CFG, cfg)


def load(folder: str | Path, device: str | torch.device = "cpu") -> SAE:
    """Return the SAE of a folder written by `save`, by SAELens or by sparsify, in evaluation mode.

    >>> from sae_granary import load_sae
    >>> sae = load_sae("runs/demo_topk")
    >>> sae.type_name, sae.config.d_sae, tuple(sae.W_dec.shape)
    ('topk', 768, (768, 384))

    Raises NotAnSAEError if the folder holds none of them or is damaged.
    """
    folder = Path(folder)
    extra = None
    if (folder / OURS).is_file():
        record = _read_json(folder / OURS)
        sae = _build(record, folder / OURS)
        tensors = _read_tensors(folder / WEIGHTS)
        extra = _read_tensors(folder / EXTRA) if sae.extra_tensors() else None
    elif (folder / CFG).is_file() and (folder / SPARSIFY_WEIGHTS).is_file():
        weights = _read_tensors(folder / SPARSIFY_WEIGHTS)
        found, settings, tensors = read_sparsify(_read_json(folder / CFG), weights, folder)
        sae, extra = found(make_config(found, settings)), tensors
    elif (folder / CFG).is_file():
        cls, options, tensors = read_saelens(_read_json(folder / CFG), _read_tensors(folder / WEIGHTS), folder)
        sae = cls(options)
    else:
        raise NotAnSAEError(f"{folder} holds no SAE: expected {OURS} or {CFG} beside {WEIGHTS} or {SPARSIFY_WEIGHTS}")
    try:
        with torch.no_grad():
            for name in ("W_enc", "W_dec", "b_dec") if sae.core.has_encoder else ("W_dec", "b_dec"):
                getattr(sae.core, name).copy_(tensors[name])
            sae.core.set_latent_tensors(tensors)
            if extra is not None:
                sae.set_extra_tensors(extra)
    except (KeyError, RuntimeError) as error:
        raise NotAnSAEError(f"the weights in {folder} do not fit their configuration: {error}") from error
    return sae.to(device).eval()


def save_native(sae: SAE, folder: str | Path) -> None:
    """Write weights and buffers as trained, for checkpoints."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder / NATIVE_WEIGHTS, dict(sae.state_dict()))
    _write_json(folder / NATIVE, {"format": FORMAT, **describe(sae.config, sae)})


def load_native(folder: str | Path) -> SAE:
    """Return the SAE written by `save_native`, bit for bit.

    Raises NotAnSAEError if files are missing, damaged or do not fit each other.
    """
    folder = Path(folder)
    sae = _build(_read_json(folder / NATIVE), folder / NATIVE)
    try:
        sae.load_state_dict(_read_tensors(folder / NATIVE_WEIGHTS), strict=True)
    except RuntimeError as error:
        raise NotAnSAEError(f"{folder / NATIVE_WEIGHTS} does not fit {NATIVE}: {error}") from error
    return sae


def describe(config: SAE.Config, sae: SAE) -> dict[str, Any]:
    """Return {"type": ..., "config": ...} as JSON values."""
    return {"type": sae.type_name, "config": dataclasses.asdict(config)}


def _inference_config(sae: SAE) -> SAE.Config:
    """The Config of the folded weights: what was folded is not applied again."""
    return dataclasses.replace(sae.config, normalize="unit_norm" if sae.normalizer.per_row else "none")


def _build(record: Mapping[str, Any], path: Path) -> SAE:
    if record.get("format") != FORMAT:
        raise NotAnSAEError(f"{path}: format {record.get('format')!r}, this version reads format {FORMAT}")
    try:
        cls = registry.get(str(record["type"]))
        return cls(make_config(cls, record["config"]))
    except (KeyError, TypeError, AttributeError) as error:
        if isinstance(error, SAEError):
            raise
        raise NotAnSAEError(f"{path} is not a description of an SAE: {error!r}") from error


def _write_json(path: Path, value: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotAnSAEError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise NotAnSAEError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise NotAnSAEError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    # Written through open(): safetensors' own writer makes files that only their owner can read.
    path.write_bytes(save_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))
    return path


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_tensors(path.read_bytes())
    except FileNotFoundError:
        raise NotAnSAEError(f"{path} is missing") from None
    except (OSError, SafetensorError) as error:
        raise NotAnSAEError(f"{path} is not a readable safetensors file: {error}") from error
    return tensors
