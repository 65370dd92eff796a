"""Open a trainer from a run's folder: at its newest checkpoint, or at the start of a new run."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sae_granary.cache.load.loader import LoaderState
from sae_granary.cache.read.recorded import PATHS, cache_paths
from sae_granary.common import files
from sae_granary.common.finished_run import CHECKPOINTS, CONFIG, RECORD, RECORD_VERSION
from sae_granary.common.signed import digest, write_signed
from sae_granary.common.threads import waiting
from sae_granary.train.callbacks import AnyCallback, Callbacks
from sae_granary.train.config.merge import differing, to_yaml
from sae_granary.train.data import passes
from sae_granary.train.data.run_data import RunData
from sae_granary.train.data.stage import stage
from sae_granary.train.errors import RunExistsError
from sae_granary.train.folders import check_one_run, read_run
from sae_granary.train.sinks.registry import open_sinks
from sae_granary.train.sinks.sink import BaseSink, Sinks
from sae_granary.train.state import checkpoint
from sae_granary.train.state.identity import check_identity
from sae_granary.train.state.initial import start_from
from sae_granary.train.state.rng import Rng
from sae_granary.train.state.run_state import Run, build_sae
from sae_granary.train.trainer import Trainer

MAY_MOVE = ("cache", "lm", "runs_dir")  # settings of a run that are places


def open_trainer(
    data: RunData, folder: Path, extra: Sequence[BaseSink], callbacks: Sequence[AnyCallback], stack: ExitStack
) -> Trainer:
    """The run of a folder that is held (`folders.exclusive`): from its newest checkpoint, or at its start.

    A run that never started is recorded first: from then on it can be resumed. Its sinks, the `extra` ones among them,
    are closed with the stack.
    Raises CheckpointError (damaged, or another cache).
    """
    stage(data)
    record = _record(data, folder)
    for place in (folder, folder / CHECKPOINTS):
        files.remove_temporary(place)
    sinks = open_sinks(data.config, folder, str(record["wandb_id"]), extra)
    stack.callback(sinks.close)
    found = checkpoint.list_checkpoints(folder)
    restored = restore_or_start(data, found[-1] if found else None, sinks)
    called = Callbacks(callbacks)
    if found:
        called.restore(restored.extra.get("callbacks", []))
    data = data.with_config(restored.run.config)
    return Trainer(data, restored.run, folder, sinks, restored.loader_state, restored.seconds, called)


def restore_or_start(data: RunData, path: Path | None, sinks: Sinks) -> checkpoint.Restored:
    """The state of a checkpoint; without one, that of a new run."""
    if path is not None:
        return checkpoint.load(path, data.config, data.identity, data.shards)
    return checkpoint.Restored(_fresh_run(data, sinks), LoaderState(data.order.seed), 0.0, {})


def _record(data: RunData, folder: Path) -> Mapping[str, Any]:
    """Write run.json to the folder unless it exists."""
    identity = asdict(data.identity)
    if (folder / RECORD).is_file():
        saved, record = read_run(folder)
        check_identity({"cache": record["cache"], "order": record["order"]}, identity, folder / RECORD)
        here = replace(saved, **{name: getattr(data.config, name) for name in MAY_MOVE})
        if found := differing(here, data.config):
            raise RunExistsError(
                f"{folder} was begun meanwhile by another process with other settings ({', '.join(found[:4])}): "
                "choose another --name"
            )
        return record
    check_one_run(folder)
    settings = to_yaml(data.config)
    record = {
        "version": RECORD_VERSION,
        "config_xxh3": digest(settings.encode()),
        "counts": data.counts.to_json(),
        **identity,
        PATHS: cache_paths(data.cache.path, folder),
        "wandb_id": secrets.token_hex(8),
    }
    files.write_text(folder / CONFIG, settings)
    write_signed(folder / RECORD, record)
    return record


def _fresh_run(data: RunData, sinks: Sinks) -> Run:
    """Build and initialize the SAE from a sample of training rows."""
    assert data.config.init_seed is not None
    seed = data.config.init_seed
    with Rng.seeded(seed, data.config.device) as rng:
        sae = build_sae(data.config, data.shards)
        with waiting("initializing the SAE from a sample of rows"):
            rows = passes.sample(data)
            sae.initialize(rows, torch.Generator().manual_seed(seed))
        told = [start_from(sae, data.config.init_from, rows)] if data.config.init_from is not None else []
        run = Run.create(data.config, sae)
    for line in told:
        sinks.message(line)
    run.rng, run.notes = rng, told
    return run
