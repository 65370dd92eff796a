"""A hash over the weights of a local model, as a harvest records it in the manifest (`weights_xxh3`)."""

from __future__ import annotations

import json
from pathlib import Path

from sae_granary.common.files import hash_files

_PATTERNS = ("*.safetensors", "pytorch_model*.bin")  # of the transformer the first that is there, of others both


def weights_hash(folder: Path) -> str:
    """Of a transformer, or of a Sentence-Transformer with all its modules."""
    first, *rest = module_folders(folder)
    found = [sorted(first.glob(pattern)) for pattern in _PATTERNS]
    paths = next((files for files in found if files), [])
    paths += [path for module in rest for pattern in _PATTERNS for path in sorted(module.glob(pattern))]
    return hash_files(paths)


def module_folders(folder: Path) -> list[Path]:
    """The folders of a Sentence-Transformer's modules, its transformer first; of any other model its own."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [folder]
    first, *rest = [str(module.get("path", "")) for module in modules]
    return [folder / first, *(folder / path for path in rest if path)]
