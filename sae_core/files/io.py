"""Files of an SAE: the inference form that SAELens reads, and the native form that training continues from.

Inference form: cfg.json, sae_weights.safetensors (normalization folded into the weights), granary.json (type, Config)
and, for what SAELens has no name for, granary.safetensors.
Native form: sae.json, sae.safetensors (weights and buffers as trained). Nothing is pickled.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sae_granary.sae_core import registry
from sae_granary.sae_core.base import SAE
from sae_granary.sae_core.errors import NotAnSAEError, SAEError
from sae_granary.sae_core.files import saelens, sparsify
from sae_granary.sae_core.files.disk import check_finite, read_json, read_tensors, write_json, write_tensors
from sae_granary.sae_core.files.fold import Folded, fold
from sae_granary.sae_core.options import SharedConfig

FORMAT = 1
WEIGHTS, OURS, EXTRA = saelens.WEIGHTS, "granary.json", "granary.safetensors"
NATIVE_WEIGHTS, NATIVE = "sae.safetensors", "sae.json"
FOREIGN = (sparsify.read, saelens.read)  # each returns what it finds in a folder, or None


def save(sae: SAE, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> list[Path]:
    """Write the inference form and return its files; `metadata` (model_name, hook_name ...) goes into cfg.json.

    A variant that SAELens cannot express gets no cfg.json: its granary.json says all that `load` needs.
    Raises NonFiniteError, and writes nothing, if a weight is NaN or Inf.
    """
    folder = Path(folder)
    metadata, folded = dict(metadata or {}), fold(sae)
    check_finite({**folded.weights, **folded.extra})
    folder.mkdir(parents=True, exist_ok=True)
    files = [write_tensors(folder / WEIGHTS, folded.weights)]
    if folded.extra:
        files.append(write_tensors(folder / EXTRA, folded.extra))
    if saelens.expresses(sae):
        files.append(write_json(folder / saelens.CFG, saelens.saelens_config(sae, metadata)))
    record = {"format": FORMAT, **describe(folded.config, sae), "metadata": metadata}
    return [*files, write_json(folder / OURS, record)]


def load(folder: str | Path, device: str | torch.device = "cpu") -> SAE:
    """Return the SAE of a folder written by `save`, by SAELens or by sparsify, in evaluation mode.

    >>> from sae_granary import load_sae
    >>> sae = load_sae("runs/demo_topk")
    >>> sae.type_name, sae.config.d_sae, tuple(sae.W_dec.shape)
    ('topk', 768, (768, 384))

    Raises NotAnSAEError if the folder holds none of them or is damaged.
    """
    folder = Path(folder)
    found = (read(folder) for read in (_read_ours, *FOREIGN))
    folded = next((each for each in found if each is not None), None)
    if folded is None:
        expected = f"{OURS} or {saelens.CFG} beside {WEIGHTS} or {sparsify.WEIGHTS}"
        raise NotAnSAEError(f"{folder} holds no SAE: expected {expected}")
    try:
        return folded.build().to(device).eval()
    except (KeyError, RuntimeError) as error:
        raise NotAnSAEError(f"the weights in {folder} do not fit their configuration: {error}") from error


def save_native(sae: SAE, folder: str | Path) -> None:
    """Write weights and buffers as trained, for checkpoints. Raises NonFiniteError as `save` does."""
    folder = Path(folder)
    check_finite(dict(sae.named_parameters()))
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / NATIVE_WEIGHTS, dict(sae.state_dict()))
    write_json(folder / NATIVE, {"format": FORMAT, **describe(sae.config, sae)})


def load_native(folder: str | Path) -> SAE:
    """Return the SAE written by `save_native`, bit for bit.

    Raises NotAnSAEError if files are missing, damaged or do not fit each other.
    """
    folder = Path(folder)
    cls, config = _described(folder / NATIVE)
    sae = cls(config)
    try:
        sae.load_state_dict(read_tensors(folder / NATIVE_WEIGHTS), strict=True)
    except RuntimeError as error:
        raise NotAnSAEError(f"{folder / NATIVE_WEIGHTS} does not fit {NATIVE}: {error}") from error
    return sae


def describe(config: SharedConfig, sae: SAE) -> dict[str, Any]:
    """Return {"type": ..., "config": ...} as JSON values."""
    return {"type": sae.type_name, "config": dataclasses.asdict(config)}


def _read_ours(folder: Path) -> Folded | None:
    if not (folder / OURS).is_file():
        return None
    extra = read_tensors(folder / EXTRA) if (folder / EXTRA).is_file() else {}
    return Folded(*_described(folder / OURS), read_tensors(folder / WEIGHTS), extra)


def _described(path: Path) -> tuple[type[SAE], SharedConfig]:
    """The variant and the Config that a file describes."""
    record = read_json(path)
    if record.get("format") != FORMAT:
        raise NotAnSAEError(f"{path}: format {record.get('format')!r}, this version reads format {FORMAT}")
    try:
        cls = registry.get(str(record["type"]))
        return cls, registry.make_config(cls, record["config"])
    except (KeyError, TypeError, AttributeError) as error:
        if isinstance(error, SAEError):
            raise
        raise NotAnSAEError(f"{path} is not a description of an SAE: {error!r}") from error
