"""Files of an SAE: the inference form that SAELens reads, and the native form that training continues from.

Inference form: cfg.json, sae_weights.safetensors (normalization folded into the weights), granary.json (type, Config)
and, for what SAELens has no name for, granary.safetensors.
Native form: sae.json, sae.safetensors (weights and buffers as trained). Nothing is pickled.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sae_granary.common.errors import one_line
from sae_granary.common.signed import short
from sae_granary.sae_core.base import SAE
from sae_granary.sae_core.errors import NotAnSAEError
from sae_granary.sae_core.files import saelens, sparsify
from sae_granary.sae_core.files.disk import check_finite, check_size, read_tensors, write_json, write_tensors
from sae_granary.sae_core.files.fold import Folded, fold
from sae_granary.sae_core.files.record import DAMAGED, read_record, write_record
from sae_granary.sae_core.files.sharded import part_name, read_parts, write_whole
from sae_granary.sae_core.ranks.reduce import ALONE, Alone
from sae_granary.sae_core.registry import build, whole_config

WEIGHTS, OURS, EXTRA = saelens.WEIGHTS, "granary.json", "granary.safetensors"
NATIVE_WEIGHTS, NATIVE = "sae.safetensors", "sae.json"
FOREIGN = (sparsify.read, saelens.read)  # each returns what it finds in a folder, or None


def save(sae: SAE, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> list[Path]:
    """Write the inference form and return its files; `metadata` (model_name, hook_name ...) goes into cfg.json.

    A variant that SAELens cannot express gets no cfg.json: its granary.json says all that `load` needs.
    Where the latents are divided over ranks, rank 0 writes those of all. Raises NonFiniteError, and writes nothing, if
    a weight is NaN or Inf.
    """
    folder, shards = Path(folder), sae.shards
    metadata, folded = dict(metadata or {}), fold(sae)
    check_finite({**folded.weights, **folded.extra})
    folder.mkdir(parents=True, exist_ok=True)
    checksums = {WEIGHTS: write_whole(folder / WEIGHTS, folded.weights, sae.core.latents, shards)}
    if folded.extra:
        checksums[EXTRA] = write_tensors(folder / EXTRA, folded.extra)
    files = [folder / name for name in checksums]
    if shards.index == 0:
        if saelens.expresses(sae):
            files.append(write_json(folder / saelens.CFG, saelens.saelens_config(sae, metadata)))
        config = replace(folded.config, d_sae=whole_config(sae).d_sae)
        files.append(write_record(folder / OURS, sae.type_name, config, checksums, metadata=metadata))
    shards.all(True)  # the files are complete before any rank reads them
    return files if shards.index == 0 else []


def load(folder: str | Path, device: str | torch.device = "cpu", shards: Alone = ALONE) -> SAE:
    """Return the SAE of a folder written by `save`, by SAELens or by sparsify, in evaluation mode.

    Of one written by `save`, each of several `shards` takes its latents only.

    >>> from sae_granary import load_sae
    >>> sae = load_sae("runs/demo_topk")
    >>> sae.type_name, sae.config.d_sae, tuple(sae.W_dec.shape)
    ('topk', 768, (768, 384))

    Raises NotAnSAEError if the folder holds none of them or is damaged.
    """
    folder = Path(folder)
    found = (read(folder) for read in (partial(_read_ours, shards=shards), *FOREIGN))
    folded = next((each for each in found if each is not None), None)
    if folded is None:
        raise NotAnSAEError(f"{folder} holds no SAE: {_what_instead(folder)}")
    try:
        sae = folded.build().to(device).eval()
        sae.shards = shards
        return sae
    except DAMAGED as error:
        raise NotAnSAEError(f"{folder}: {one_line(error)}") from error


def _what_instead(folder: Path) -> str:
    """Suggest what to load instead of a folder without an SAE: often it has one subfolder per layer."""
    if folder.is_dir():
        subfolders = [path for path in folder.iterdir() if any((path / name).is_file() for name in (OURS, saelens.CFG))]
        if names := sorted((path.name for path in subfolders), key=lambda name: (len(name), name)):
            return f"its subfolders do, give one of them: {short(', '.join(names))}"
    expected = f"expected {OURS} or {saelens.CFG} beside {WEIGHTS} or {sparsify.WEIGHTS}"
    if folder.is_file():
        return f"{expected} in a folder, this is a file"
    return (
        expected if folder.exists() else f"{expected}, there is no such folder (download SAEs of the model hub first)"
    )


def save_native(sae: SAE, folder: str | Path) -> None:
    """Write weights and buffers as trained, for checkpoints; each of several shards writes its latents.

    Raises NonFiniteError as `save` does.
    """
    folder = Path(folder)
    check_finite(dict(sae.named_parameters()))
    folder.mkdir(parents=True, exist_ok=True)
    name = part_name(NATIVE_WEIGHTS, sae.shards)
    own = {name: write_tensors(folder / name, dict(sae.state_dict()))}
    checksums = [json.loads(text) for text in sae.shards.texts(json.dumps(own))]
    if sae.shards.index == 0:
        write_record(folder / NATIVE, sae.type_name, whole_config(sae), {k: v for c in checksums for k, v in c.items()})


def load_native(folder: str | Path, shards: Alone = ALONE) -> SAE:
    """Return the SAE written by `save_native`, by any number of shards, bit for bit; a shard gets its latents.

    Raises NotAnSAEError if files are missing, damaged or do not fit each other.
    """
    folder = Path(folder)
    cls, config, checksums = read_record(folder / NATIVE)
    tensors = read_parts(folder, NATIVE_WEIGHTS, config.d_sae, cls.latents, shards, checksums)
    try:
        check_size(replace(config, d_sae=config.d_sae // shards.n), tensors.values())
        sae = build(cls, config, shards)
        if changed := [
            name for name, t in sae.state_dict().items() if name in tensors and tensors[name].dtype != t.dtype
        ]:
            raise NotAnSAEError(f"{', '.join(changed)} of another dtype")
        check_finite({name: tensors[name] for name, _ in sae.named_parameters() if name in tensors})
        sae.load_state_dict(tensors, strict=True)
    except DAMAGED as error:
        raise NotAnSAEError(f"{folder / NATIVE_WEIGHTS} does not fit {NATIVE}: {one_line(error)}") from error
    return sae


def _read_ours(folder: Path, shards: Alone = ALONE) -> Folded | None:
    if not (folder / OURS).is_file():
        return None
    cls, config, checksums = read_record(folder / OURS)
    if shards.n > 1:
        weights = read_parts(folder, WEIGHTS, config.d_sae, cls.latents, shards)
        return Folded(cls, replace(config, d_sae=config.d_sae // shards.n), weights, {})
    has_extra = EXTRA in checksums if checksums else (folder / EXTRA).is_file()
    extra = read_tensors(folder / EXTRA, checksums.get(EXTRA)) if has_extra else {}
    return Folded(cls, config, read_tensors(folder / WEIGHTS, checksums.get(WEIGHTS)), extra)
