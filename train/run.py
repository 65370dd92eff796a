"""A whole run: from a config to runs/<name>/ (`train.folders`), and from a checkpoint onwards."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from cache.loader import LoaderState
from train import checkpoint, files
from train.capacity import check_capacity
from train.config import TrainConfig, make_config, to_yaml
from train.data import Data
from train.errors import RunExistsError
from train.folders import CONFIG, RECORD, RECORD_VERSION, SUMMARY, claim_folder, exclusive, is_complete, read_run
from train.log import JsonlSink, Sink, Sinks
from train.session import Result, Session
from train.signals import StopRequest
from train.state import Run, build_sae

__all__ = ["Result", "resume_training", "train_sae"]


def train_sae(
    config: TrainConfig | None = None,
    *,
    sinks: Sequence[Sink] = (),
    overwrite: bool = False,
    stop: StopRequest | None = None,
    **settings: Any,
) -> Result:
    """Train an SAE from a cache: `train_sae(cache="cache/bert_l6", type="topk", k=32)`.

    Settings are those of `TrainConfig` and of the variant; together with a `config` they replace its values.
    Everything that can be wrong is told before anything is written (ConfigError, CacheError, SAEError).
    """
    config = make_config([settings]) if config is None else _replace(config, settings)
    data = Data.open(config)
    check_capacity(data.config)
    folder = claim_folder(data.config, overwrite=overwrite)
    with ExitStack() as stack:
        stack.enter_context(exclusive(folder))
        wandb_id = secrets.token_hex(8)
        session = _open_session(stack, data, folder, None, _all_sinks(data.config, folder, wandb_id, sinks), stop)
        files.write_text(folder / CONFIG, to_yaml(data.config))
        counts = data.counts.to_json()
        record = {"version": RECORD_VERSION, "counts": counts, **asdict(session.identity), "wandb_id": wandb_id}
        files.write_json(folder / RECORD, record)  # from here on the run can be resumed
        return session.execute(_fresh_run(session))


def resume_training(folder: str | Path, *, sinks: Sequence[Sink] = (), stop: StopRequest | None = None) -> Result:
    """Continue a run from its newest checkpoint, bit for bit as if it had never stopped (on the same machine).

    Raises NotARunError, CheckpointError (damaged, or another cache), RunExistsError (already complete).
    """
    folder = Path(folder)
    config, record = read_run(folder)
    if is_complete(folder):
        raise RunExistsError(f"{folder} is complete; its result is in {folder / SUMMARY}")
    data = Data.reopen(config, record)
    identity = checkpoint.Identity(dict(data.cache.manifest.fingerprint), record["order"])
    checkpoint.check_identity({"cache": record["cache"], "order": record["order"]}, asdict(identity), folder / RECORD)
    with ExitStack() as stack:
        stack.enter_context(exclusive(folder))
        files.remove_temporary(folder / checkpoint.FOLDER)
        found = checkpoint.list_checkpoints(folder)
        restored = checkpoint.load(found[-1], config, identity) if found else None
        state = restored.loader_state if restored else None
        all_sinks = _all_sinks(config, folder, str(record["wandb_id"]), sinks)
        session = _open_session(stack, data, folder, state, all_sinks, stop)
        checkpoint.check_identity(asdict(identity), asdict(session.identity), folder / RECORD)
        if restored is None:
            return session.execute(_fresh_run(session))
        return session.execute(restored.run, restored.seconds)


def _fresh_run(session: Session) -> Run:
    """Build and initialise the SAE from a sample of training rows."""
    config = session.data.config
    assert config.init_seed is not None
    torch.manual_seed(config.init_seed)
    sae = build_sae(config)
    sae.initialize(session.data.sample(), torch.Generator().manual_seed(config.init_seed))
    run = Run.create(config, sae)
    if session.stop:
        raise session.interrupted(run)
    return run


def _open_session(
    stack: ExitStack,
    data: Data,
    folder: Path,
    state: LoaderState | None,
    sinks: Sinks,
    stop: StopRequest | None,
) -> Session:
    stack.callback(sinks.close)
    loader = stack.enter_context(data.batches(state))
    if data.eval_part != "heldout":
        sinks.message("no document is held out: the final evaluation uses training rows")
    return Session(data, loader, folder, sinks, StopRequest() if stop is None else stop)


def _all_sinks(config: TrainConfig, folder: Path, wandb_id: str, extra: Sequence[Sink]) -> Sinks:
    sinks: list[Sink] = [JsonlSink(folder)]
    if config.wandb != "off":
        from train.wandb_sink import WandbSink

        sinks.append(WandbSink(folder, config.wandb_project, config.wandb, wandb_id))
    return Sinks([*sinks, *extra])


def _replace(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """A config with some settings changed, checked as all settings are."""
    own = {k: v for k, v in settings.items() if k in TrainConfig.__dataclass_fields__ and k != "options"}
    options = {k: v for k, v in settings.items() if k not in own}
    checked = make_config([{"type": own.get("type", config.type), **own, **options}]) if settings else config
    changed = {k: getattr(checked, k) for k in own}
    kept = config.options if checked.type == config.type else {}  # another type has other options
    return replace(config, **changed, options={**kept, **checked.options}) if settings else config
