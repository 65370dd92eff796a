"""The processes that share a harvest: torchrun's ranks, or jobs that only share the folder of the cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from sae_granary.cache.errors import CacheError
from sae_granary.cache.format.records import existing_manifest
from sae_granary.common.device import check_usable
from sae_granary.common.errors import ConfigError
from sae_granary.common.settings.environment import number, rank_of_process, seconds
from sae_granary.harvest.config import HarvestConfig
from sae_granary.models.device.placement import STRATEGIES

DEFAULT_BLOCK_DOCS = 4096
LEASE_SECONDS = "GRANARY_LEASE_SECONDS"
_DEFAULT_LEASE = 120.0


@dataclass(frozen=True)
class World:
    """Which process this is. Nothing here waits for the others, or needs them to be there."""

    rank: int | None  # None for a job of its own
    size: int
    local_rank: int
    local_size: int = 1  # processes on this machine

    @classmethod
    def of_environment(cls) -> World:
        """As torchrun tells it; without torchrun a process is alone."""
        rank = rank_of_process()
        if rank is None:
            return cls(None, 1, 0)
        return cls(rank.index, rank.n, rank.local, number(os.environ, "LOCAL_WORLD_SIZE", 1))

    @property
    def tells(self) -> bool:
        """Whether this process prints the progress of all."""
        return not self.rank

    @contextmanager
    def named(self) -> Iterator[None]:
        """Put the rank in front of the message of an error that leaves the block."""
        try:
            yield
        except Exception:
            if self.rank is not None:
                sys.stderr.write(f"rank {self.rank}: ")
                sys.stderr.flush()
            raise


def lease_seconds() -> float:
    """After so long without a sign of life the block of another process is taken over."""
    return seconds(os.environ, LEASE_SECONDS, _DEFAULT_LEASE, least=0.1)


def share_cores(world: World, device: str) -> None:
    """On a CPU, give each process of torchrun its share of the cores: torchrun gives each one thread."""
    if world.local_size < 2 or device != "cpu" or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return
    import torch

    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, n // world.local_size))


def in_blocks(config: HarvestConfig, world: World) -> HarvestConfig:
    """The config with the blocks that its cache has, or that several ranks need; each rank gets a GPU.

    Raises ConfigError for what cannot be divided.
    """
    try:
        have = existing_manifest(config.out_path)
    except CacheError:
        have = None  # reported when the cache is opened
    docs = config.block_docs
    if docs is None and have is not None:
        docs = have.block_docs
    if docs is None and world.size > 1 and (have is None or not have.complete):
        docs = DEFAULT_BLOCK_DOCS
    if docs is None:
        return config
    if config.text.dataset == "-":
        raise ConfigError("standard input cannot be divided into blocks: write the text to a file first")
    if world.local_size > 1 and config.model.device_map in STRATEGIES:
        raise ConfigError(
            f"--device-map {config.model.device_map} takes all GPUs of a machine, and {world.local_size} processes "
            "were started on this one: use --nproc-per-node 1, or name devices with --device-map cuda:0"
        )
    return replace(config, block_docs=docs, model=replace(config.model, device=_device(config.model.device, world)))


def _device(wanted: str, world: World) -> str:
    """With several GPUs each local rank uses one."""
    if world.size < 2 or wanted not in ("auto", "cuda"):
        return wanted
    import torch

    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if n:
        check_usable(f"cuda:{world.local_rank % n}")
    return f"cuda:{world.local_rank % n}" if n > 1 else wanted
