"""One SAE on several ranks, each with its part of the rows of every batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sae_granary import __version__, sae_core
from sae_granary.cache.load.loader import LoaderState, Share
from sae_granary.common.device import choose_device
from sae_granary.common.errors import ConfigError
from sae_granary.common.settings.yaml_file import load_yaml
from sae_granary.common.signals import StopRequest
from sae_granary.train.callbacks import Callbacks
from sae_granary.train.config.merge import from_sections, to_yaml
from sae_granary.train.config.phases import first_context_step
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.data.run_data import RunData
from sae_granary.train.data.stage import stage
from sae_granary.train.lockstep import train_together
from sae_granary.train.open_trainer import restore_or_start
from sae_granary.train.ranks.place import Place
from sae_granary.train.ranks.sharded import ShardTrainer, check_sharded
from sae_granary.train.ranks.trainer import RankTrainer, RowsTrainer, receive_state, send_state
from sae_granary.train.ranks.world import World, joined, pin_device
from sae_granary.train.sinks.sink import Sinks
from sae_granary.train.state.checkpoint import list_checkpoints
from sae_granary.train.state.identity import check_identity
from sae_granary.train.state.run_state import Run, build_sae
from sae_granary.train.trainer import Result, Trainer

Begun = tuple[RunData, Path] | Result  # a run to train, or the result of one that is complete


def train_on_ranks(
    place: Place,
    begin: Callable[[Callable[[RunData], RunData]], Begun],
    open_run: Callable[[RunData, Path], AbstractContextManager[Trainer]],
    arguments: Mapping[str, Any],
    device: str,
    stop: StopRequest | None,
) -> Result:
    """Train one SAE on all ranks, which must be started with equal `arguments`; every rank returns its result.

    Rank 0 begins the run (`begin`, which gets what checks the resolved settings and gives this rank its part) and
    writes its folder; the others get settings, shards and weights from it, and need the cache only. With
    `shard_latents` they read all rows, and see the folder, to which each writes its latents.
    Raises RankError for ranks that are missing, fail or stop answering, ConfigError for ranks that disagree.
    """
    device = choose_device(device)
    pin_device(place, device)
    with joined(place, device) as world:
        world.watch(True)
        world.compare({"version": __version__, "torch": torch.__version__, "ranks": place.n, **arguments})
        asked = StopRequest() if stop is None else stop
        if not place.leads:
            return _follow(world, asked)
        begun = begin(partial(_part, world))
        if isinstance(begun, Result):
            world.say("run", {"complete": str(begun.folder), "summary": begun.summary})
            return begun
        data, folder = begun
        record = {"counts": data.counts.to_json(), **asdict(data.identity)}
        found = [str(path.absolute()) for path in list_checkpoints(folder)]
        where = {"folder": str(folder.absolute()), "checkpoint": found[-1] if found else None}
        world.say("run", {"config": to_yaml(data.config), "record": record, **where})
        with open_run(data, folder) as trainer:
            state, seconds, kind = trainer.state, trainer.clock.seconds, _trainer_of(data)
            if kind is RowsTrainer:
                send_state(world, trainer.run)
                world.say("loader", asdict(state))
            rest = (trainer.run, folder, trainer.sinks, state, seconds, trainer.callbacks)
            ours = kind(world, asked, trainer.data, *rest)
            return train_together([ours], ours.agreed)[ours]


def _follow(world: World, asked: StopRequest) -> Result:
    told = world.hear("run")
    if "complete" in told:
        return Result(sae_core.load(told["complete"]), Path(told["complete"]), told["summary"])
    config, record = from_sections(load_yaml(told["config"]), "the settings of rank 0"), told["record"]
    data = RunData.reopen(config, record)
    stage(data)
    where = f"{config.cache} of rank {world.place.index}"
    check_identity({"cache": record["cache"], "order": record["order"]}, asdict(data.identity), Path(where))
    data, folder, kind = _part(world, data), Path(told["folder"]), _trainer_of(data)
    if kind is RowsTrainer:
        run = Run.create(config, build_sae(config))
        run.ema = None  # rank 0 averages the weights
        receive_state(world, run)
        state, seconds = LoaderState(**world.hear("loader")), 0.0
    else:
        path = None if told["checkpoint"] is None else _visible(Path(told["checkpoint"]), world.place)
        restored = restore_or_start(data, path, Sinks([]))
        run, state, seconds = restored.run, restored.loader_state, restored.seconds
        data = data.with_config(run.config)
    ours = kind(world, asked, data, run, folder, Sinks([]), state, seconds, Callbacks(()))
    return train_together([ours], ours.agreed)[ours]


def _trainer_of(data: RunData) -> type[RankTrainer]:
    return ShardTrainer if data.config.shard_latents else RowsTrainer


def _visible(folder: Path, place: Place) -> Path:
    if not folder.is_dir():
        raise ConfigError(
            f"rank {place.index} does not see {folder}, from which the run continues: expected a folder that all ranks "
            "share; change --runs-dir"
        )
    return folder


def _part(world: World, data: RunData) -> RunData:
    """What this rank reads and trains: a share of each batch, or of the latents. Raises ConfigError."""
    config, place = data.config, world.place
    if config.shard_latents:
        check_sharded(config, place.n)
        return replace(data, shards=world.ranks)
    check_shared(config, place.n)
    return replace(data, share=Share(place.index, place.n, config.grad_acc_steps))


def check_shared(config: TrainConfig, n: int) -> None:
    """Refuse what n ranks cannot train as one would. Raises ConfigError."""
    alone = "train it with one process, or several of them with sae-train sweep"
    if not sae_core.registry.get(config.type).splits_batches:
        raise ConfigError(f"type={config.type!r} compares the rows of a batch, which {n} ranks would divide: {alone}")
    if first_context_step(config) is not None:
        raise ConfigError(f"a loss through the language model is computed by one rank, there are {n}: {alone}")
    least = min(size for size in Share(0, n, config.grad_acc_steps).sizes(config.batch_size))
    if least < 1:
        raise ConfigError(
            f"batch_size={config.batch_size} in {config.grad_acc_steps} micro-batches leaves one of {n} ranks without "
            "rows: raise --batch-size, or start fewer ranks"
        )
