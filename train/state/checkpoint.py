"""Checkpoints: all that a bitwise resume needs, in safetensors and JSON, under a name that appears when complete.

checkpoints/step_00001000/
    sae/                     native weights and buffers (dead counters, thresholds)
    optimizer.safetensors    moments and counts by parameter
    density.safetensors      how often each latent fired lately
    ema.safetensors          averaged weights, if the run keeps them
    rng.safetensors          torch's generators
    state.json               step, counters, loader state, what the run belongs to, and a hash of every file above

Where ranks divide the latents, each writes its part of the files of tensors (`sae_core.files.sharded`).
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sae_granary import sae_core
from sae_granary.cache.load.loader import LoaderState
from sae_granary.common.errors import one_line
from sae_granary.common.files import hash_files, read_regular
from sae_granary.common.finished_run import CHECKPOINTS
from sae_granary.common.signed import Fields, sign
from sae_granary.sae_core import SAE
from sae_granary.sae_core.files.sharded import has_latents_of, part_name, read_parts
from sae_granary.sae_core.ranks.reduce import ALONE, Alone
from sae_granary.sae_core.registry import whole_config
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.errors import CheckpointError
from sae_granary.train.optim.optimizers import load_state_tensors, state_tensors
from sae_granary.train.state.density import Density
from sae_granary.train.state.identity import Identity, check_identity
from sae_granary.train.state.patience import Patience
from sae_granary.train.state.rng import Rng
from sae_granary.train.state.run_state import Run
from sae_granary.train.state.shared_folder import hashes_of_all, shared_folder

VERSION = 2  # since 2 state.json carries a checksum
SHARDED_VERSION = 3  # the files of tensors are in parts
FOLDER, STATE = "checkpoints", "state.json"
_PARTS = ("optimizer", "density", "ema", "rng", "sae/sae")
_OWN_FILES = ("sae/sae.json", *(f"{part}.safetensors" for part in _PARTS))  # callbacks may add others
_NAME = re.compile(r"step_(\d{8})")


class _State(Fields):
    """Fields of state.json."""

    damaged = CheckpointError


@dataclass(frozen=True)
class Restored:
    """What a checkpoint returns besides the run."""

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
    path, shards = folder / CHECKPOINTS / _folder_name(run.step), run.sae.shards
    with shared_folder(path, shards) as temp:
        sae_core.save_native(run.sae, temp / "sae")
        parts = {
            "optimizer": state_tensors(run.optimizer, run.parameter_names),
            "density": {"fired": run.density.fired},
        }
        parts |= {} if run.ema is None else {"ema": run.ema.tensors}
        for name, tensors in parts.items():
            _write(temp / part_name(f"{name}.safetensors", shards), tensors)
        if shards.index == 0:
            _write(temp / "rng.safetensors", run.rng.tensors)
        hashes = hashes_of_all(temp, shards)
        state = {
            "format_version": VERSION if shards.n == 1 else SHARDED_VERSION,
            "step": run.step,
            "tokens": run.tokens,
            "rejected": run.rejected,
            "rejected_in_row": run.rejected_in_row,
            "score": run.score,
            "patience": asdict(run.patience),
            "notes": run.notes,
            "grad_acc_steps": run.config.grad_acc_steps,
            "density_rows": run.density.n_rows,
            "ema_updates": 0 if run.ema is None else run.ema.n_updates,
            "loader": asdict(loader_state),
            "identity": asdict(identity),
            "seconds": seconds,
            "extra": dict(extra or {}),
            "files": hashes,
        }
        if shards.index == 0:
            (temp / STATE).write_bytes(sign(state, allow_nan=True))
    if shards.index:
        return path
    kept = list_checkpoints(folder)[-run.config.keep :]
    if run.config.keep_best:
        kept.append(best_checkpoint(folder) or path)
    for old in _step_folders(folder):  # also those of which a killed process has removed a part
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)
    return path


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the lowest score, the oldest of equals; None if nothing was measured yet."""
    scores = {path: _score(path) for path in list_checkpoints(folder)}
    measured = {path: score for path, score in scores.items() if score is not None}
    return min(measured, key=lambda path: measured[path]) if measured else None


def _score(path: Path) -> float | None:
    """The score in a checkpoint's state; None for one that cannot be read, and for NaN or Inf."""
    try:
        score = _optional_number(_State.of_file(path / STATE, ""), "score")
    except CheckpointError:
        return None
    return score if score is not None and math.isfinite(score) else None


def load(path: Path, config: TrainConfig, identity: Identity | None = None, shards: Alone = ALONE) -> Restored:
    """Read a checkpoint back into a run, by any number of shards.

    Raises CheckpointError if it is damaged or belongs to something else.
    """
    state = read_state(path, shards)
    try:
        return _restore(path, state, config, identity, shards)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, SafetensorError) as error:
        problem = one_line(error)  # of a checkpoint of version 1: no hash covers its state.json
        raise CheckpointError(f"{path}/{STATE} is damaged ({problem}); {_remedy(path)}") from None


def _restore(path: Path, state: Fields, config: TrainConfig, identity: Identity | None, shards: Alone) -> Restored:
    if identity is not None:
        saved = state.nested("identity")
        parts = {part: saved.get(part, dict) for part in ("cache", "order")}
        check_identity(parts, asdict(identity), path)
    sae = sae_core.load_native(path / "sae", shards)
    if sae.type_name != config.type:
        raise CheckpointError(f"{path} holds a {sae.type_name}, the run's config says {config.type}")
    if whole_config(sae) != sae_core.make_config(type(sae), config.options):
        raise CheckpointError(f"{path} holds an SAE with other options than the run's config says")
    if "grad_acc_steps" in state.body:  # more than at first, after an out-of-memory
        config = replace(config, grad_acc_steps=state.integer("grad_acc_steps"))
    run = Run.create(config, sae)
    load_state_tensors(run.optimizer, run.parameter_names, _read(path, "optimizer", sae))
    run.step, run.tokens = state.integer("step"), state.integer("tokens")
    run.rejected, run.rejected_in_row = state.integer("rejected"), state.integer("rejected_in_row")
    if "patience" in state.body:
        patience = state.nested("patience")
        run.patience = Patience(_optional_number(patience, "best"), patience.integer("since"))
    run.notes = [str(note) for note in state.get("notes", list)] if "notes" in state.body else []
    run.density = Density(_read(path, "density", sae)["fired"], state.integer("density_rows"))
    if run.ema is not None:
        run.ema.restore(state.integer("ema_updates"), _read(path, "ema", sae))
    run.rng = Rng(run.config.device, _read_file(path / "rng.safetensors"))
    run.score = _optional_number(state, "score")
    loader = state.nested("loader")
    loader_state = LoaderState(**{name: loader.integer(name) for name in loader.body})
    return Restored(run, loader_state, state.number("seconds"), state.get("extra", dict))


def _optional_number(fields: Fields, name: str) -> float | None:
    return None if fields.body.get(name) is None else fields.number(name)


def _remedy(path: Path) -> str:
    return f"remove {path} to resume from an older checkpoint"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run's folder, oldest first."""
    return [path for path in _step_folders(folder) if (path / STATE).is_file()]


def _step_folders(folder: Path) -> list[Path]:
    found = (folder / CHECKPOINTS).glob("step_*") if (folder / CHECKPOINTS).is_dir() else ()
    return sorted(path for path in found if _NAME.fullmatch(path.name))


def read_state(path: Path, shards: Alone = ALONE) -> Fields:
    """state.json of a checkpoint whose files have the bytes that were written; of several shards, those it reads.

    Raises CheckpointError.
    """
    state = _State.of_file(path / STATE, _remedy(path), signed_since=2, key="format_version")
    version = state.integer("format_version")
    if not 1 <= version <= SHARDED_VERSION:
        raise CheckpointError(f"{path}: checkpoint format {version}, this version reads 1 to {SHARDED_VERSION}")
    if path.name != _folder_name(state.integer("step")):
        raise CheckpointError(f"{path}/{STATE} is of step {state.body['step']}; {_remedy(path)}")
    hashes = state.nested("files")
    for name in hashes.body:
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise CheckpointError(f"{path}/{STATE} names a file outside of the checkpoint: {name!r}; {_remedy(path)}")
        is_read = has_latents_of(name, shards)
        if not (path / name).is_file() or (is_read and hash_files([path / name]) != hashes.get(name, str)):
            raise CheckpointError(f"{path / name} is missing or damaged; {_remedy(path)}")
    if unlisted := [name for name in _OWN_FILES if (path / name).exists() and name not in hashes.body]:
        raise CheckpointError(f"{path}/{STATE} does not list {unlisted[0]}; {_remedy(path)}")
    return state


def _folder_name(step: int) -> str:
    return f"step_{step:08d}"


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Through our own open(): safetensors' writer makes files that only their owner can read.
    path.write_bytes(save_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))


def _read(folder: Path, name: str, sae: SAE) -> dict[str, Tensor]:
    path = folder / f"{name}.safetensors"
    if sae.shards.n == 1 and path.is_file():
        return _read_file(path)
    return read_parts(folder, path.name, whole_config(sae).d_sae, sae.core.latents, sae.shards)


def _read_file(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_tensors(read_regular(path))
    return tensors
