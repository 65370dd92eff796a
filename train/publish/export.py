"""Export a trained SAE to the files of other tools: SAELens, sparsify, delphi."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sae_granary import sae_core
from sae_granary.common.errors import ConfigError, nearest
from sae_granary.common.files import user_path
from sae_granary.common.finished_run import SAE_RECORD, read_metadata
from sae_granary.sae_core import SAE
from sae_granary.sae_core.errors import OptionError
from sae_granary.sae_core.files import saelens
from sae_granary.train.errors import RunExistsError
from sae_granary.train.folders import check_one_run, refuse_code


def export(run: Path, to: str, out: Path) -> Path:
    """Write the SAE of a run for another tool and return the folder that holds it.

    Raises ConfigError for an unknown tool, RunExistsError if `out` holds anything, SAEError for a type that the tool
    cannot express.
    """
    if to not in WRITERS:
        raise ConfigError(f"--to {to!r} is unknown (known: {', '.join(WRITERS)}){nearest(to, WRITERS)}")
    check_one_run(run)
    sae, metadata = sae_core.load(run), read_metadata(run)
    out = user_path("--out", str(out))
    refuse_code(out, "--out")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunExistsError(f"{out} is {'not empty' if out.is_dir() else 'no folder'}: choose another --out")
    return WRITERS[to](sae, out, metadata)


def _saelens(sae: SAE, out: Path, metadata: Mapping[str, Any]) -> Path:
    if not saelens.expresses(sae):
        raise ConfigError(f"type {sae.type_name} cannot be written for SAELens: it has no such architecture")
    sae_core.save(sae, out, metadata)
    (out / SAE_RECORD).unlink()
    return out


def _sparsify(sae: SAE, out: Path, metadata: Mapping[str, Any]) -> Path:
    sae_core.save_sparsify(sae, out, metadata)
    return out


def _delphi(sae: SAE, out: Path, metadata: Mapping[str, Any]) -> Path:
    """Write for delphi: a folder of sparsify coders, one subfolder per hook point, named by its module path."""
    hook = str(metadata.get("hf_hook_name") or "hook")
    if "/" in hook or hook.startswith("."):
        raise ConfigError(f"hf_hook_name {hook!r} of the run is not a module path")
    try:
        return _sparsify(sae, out / hook, metadata).parent
    except OptionError as error:
        raise ConfigError(f"--to delphi: delphi reads the coders of sparsify, and {error}") from None


WRITERS: dict[str, Callable[[SAE, Path, Mapping[str, Any]], Path]] = {
    "saelens": _saelens,
    "sparsify": _sparsify,
    "delphi": _delphi,
}
