"""Checkpoints: all that a bitwise resume needs, in safetensors and JSON, under a name that appears when complete.

checkpoints/step_00001000/
    sae/                     native weights and buffers (dead counters, thresholds)
    optimizer.safetensors    moments and counts by parameter
    density.safetensors      how often each latent fired lately
    ema.safetensors          averaged weights, if the run keeps them
    rng.safetensors          torch's generators
    state.json               step, counters, loader state, what the run belongs to, and a hash of every file above
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sae_granary import sae_core
from sae_granary.cache.load.loader import LoaderState
from sae_granary.common import files
from sae_granary.common.files import hash_files
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.errors import CheckpointError
from sae_granary.train.optim.optimizers import load_state_tensors, state_tensors
from sae_granary.train.state.density import Density
from sae_granary.train.state.patience import Patience
from sae_granary.train.state.rng import Rng
from sae_granary.train.state.run_state import Run

FORMAT_VERSION = 1
FOLDER = "checkpoints"
_NAME = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to; a resume refuses anything else."""

    cache: Mapping[str, Any]  # the cache's fingerprint
    order: Mapping[str, Any]  # the loader's order: shards, block size, pool size, seed


@dataclass(frozen=True)
class Restored:
    """What a checkpoint gives back beside the run."""

    run: Run
    loader_state: LoaderState
    seconds: float  # training time until then
    extra: Mapping[str, Any]


def save(
    folder: Path,
    run: Run,
    loader_state: LoaderState,
    identity: Identity,
    *,
    seconds: float = 0.0,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write checkpoints/step_N of a run's folder, then drop all but the newest `keep` and the best, if that is kept."""
    path = folder / FOLDER / f"step_{run.step:08d}"
    with files.new_folder(path) as temp:
        sae_core.save_native(run.sae, temp / "sae")
        _write(temp / "optimizer.safetensors", state_tensors(run.optimizer, run.parameter_names))
        _write(temp / "rng.safetensors", run.rng.tensors)
        _write(temp / "density.safetensors", {"fired": run.density.fired})
        if run.ema is not None:
            _write(temp / "ema.safetensors", run.ema.tensors)
        hashes = {str(p.relative_to(temp)): hash_files([p]) for p in sorted(temp.rglob("*")) if p.is_file()}
        state = {
            "format_version": FORMAT_VERSION,
            "step": run.step,
            "tokens": run.tokens,
            "rejected": run.rejected,
            "rejected_in_row": run.rejected_in_row,
            "score": run.score,
            "patience": asdict(run.patience),
            "density_rows": run.density.n_rows,
            "ema_updates": 0 if run.ema is None else run.ema.n_updates,
            "loader": asdict(loader_state),
            "identity": asdict(identity),
            "seconds": seconds,
            "extra": dict(extra or {}),
            "files": hashes,
        }
        (temp / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    kept = list_checkpoints(folder)[-run.config.keep :]
    if run.config.keep_best:
        kept.append(best_checkpoint(folder) or path)
    for old in list_checkpoints(folder):
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)
    return path


def best_checkpoint(folder: Path) -> Path | None:
    """The one of the lowest score, the oldest of equals; None where nothing was measured yet."""
    scores = {path: _score(path) for path in list_checkpoints(folder)}
    measured = {path: score for path, score in scores.items() if score is not None}
    return min(measured, key=lambda path: measured[path]) if measured else None


def _score(path: Path) -> float | None:
    """The score in a checkpoint's state; None for one that cannot be read, and for NaN or Inf."""
    try:
        score = json.loads((path / "state.json").read_text(encoding="utf-8")).get("score")
    except (OSError, ValueError, AttributeError):
        return None
    return float(score) if score is not None and math.isfinite(score) else None


def load(path: Path, config: TrainConfig, identity: Identity | None = None) -> Restored:
    """Read a checkpoint back into a run. Raises CheckpointError if it is damaged or belongs to something else."""
    state = read_state(path)
    try:
        return _restore(path, state, config, identity)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # no hash covers state.json itself
        raise CheckpointError(
            f"{path}/state.json is damaged ({error!r}); remove {path} to resume from an older checkpoint"
        ) from None


def _restore(path: Path, state: Mapping[str, Any], config: TrainConfig, identity: Identity | None) -> Restored:
    if identity is not None:
        check_identity(state["identity"], asdict(identity), path)
    sae = sae_core.load_native(path / "sae")
    if sae.type_name != config.type:
        raise CheckpointError(f"{path} holds a {sae.type_name}, the run's config says {config.type}")
    run = Run.create(config, sae)
    load_state_tensors(run.optimizer, run.parameter_names, _read(path / "optimizer.safetensors"))
    run.step, run.tokens = int(state["step"]), int(state["tokens"])
    run.rejected, run.rejected_in_row = int(state["rejected"]), int(state["rejected_in_row"])
    run.patience = Patience(**state.get("patience", {}))
    run.density = Density(_read(path / "density.safetensors")["fired"], int(state["density_rows"]))
    if run.ema is not None:
        run.ema.restore(int(state["ema_updates"]), _read(path / "ema.safetensors"))
    run.rng, run.score = Rng(_read(path / "rng.safetensors")), state.get("score")
    return Restored(run, LoaderState(**state["loader"]), float(state["seconds"]), state["extra"])


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run's folder, oldest first."""
    found = (folder / FOLDER).glob("step_*") if (folder / FOLDER).is_dir() else ()
    return sorted(p for p in found if _NAME.fullmatch(p.name) and (p / "state.json").is_file())


def read_state(path: Path) -> dict[str, Any]:
    """The checked state.json of a checkpoint whose files all have the bytes that were written."""
    remedy = f"remove {path} to resume from an older checkpoint"
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        version = state["format_version"]
        hashes = state["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}/state.json cannot be read ({error!r}); {remedy}") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: checkpoint format {version!r}, this version reads {FORMAT_VERSION}")
    for name, expected in hashes.items():
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise CheckpointError(f"{path}/state.json names a file outside of the checkpoint: {name!r}; {remedy}")
        if not (path / name).is_file() or hash_files([path / name]) != expected:
            raise CheckpointError(f"{path / name} is missing or damaged; {remedy}")
    assert isinstance(state, dict)
    return state


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Compare what a checkpoint belongs to with what there is. Raises CheckpointError with the first differences."""
    saved, now = json.loads(json.dumps(saved)), json.loads(json.dumps(now))
    differences = [
        f"{part}.{key}: checkpoint {saved[part].get(key)!r}, now {now[part].get(key)!r}"
        for part in ("cache", "order")
        for key in sorted({*saved[part], *now[part]})
        if saved[part].get(key) != now[part].get(key)
    ]
    if differences:
        raise CheckpointError(
            f"{path} belongs to another cache or order of rows: {'; '.join(differences[:4])}; "
            "train a new run on this cache instead"
        )


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Through our own open(): safetensors' writer makes files that only their owner can read.
    path.write_bytes(save_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))


def _read(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_tensors(path.read_bytes())
    return tensors
