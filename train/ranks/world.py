"""The ranks of a training: how they meet, what they tell each other, and which of them is gone.

They meet at a TCP store, which torchrun's agent serves (without an agent, rank 0). In it each rank leaves where it
runs, a beat every half second, what it was started with, and why it failed. All of this is text; tensors go through
torch.distributed (`Ranks`), with gloo on the CPU and NCCL on GPUs.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch._C._distributed_c10d import Store

from sae_granary.common.device import check_usable
from sae_granary.common.errors import ConfigError, one_line
from sae_granary.sae_core.ranks.reduce import Ranks
from sae_granary.train.errors import RankError
from sae_granary.train.ranks.hearts import BEAT, Hearts, gone
from sae_granary.train.ranks.meet import SLOWEST, connect, meet, store_of
from sae_granary.train.ranks.place import Place

BEATS_MISSED = 10  # in a row, after a connection broke: the rank is gone


class World:
    """The ranks that joined. `ranks` reduces tensors over them."""

    def __init__(self, place: Place, store: Store, name: str) -> None:
        self.place, self._store = place, store
        self.ranks = Ranks(place.index, place.n, self._failed)
        self._hearts = Hearts(place, store_of(place, name, SLOWEST))

    # -- texts -----------------------------------------------------------------------------------------------------

    def say(self, name: str, value: Any) -> None:
        """Leave a JSON value for the others."""
        self._store.set(name, json.dumps(value))

    def hear(self, name: str) -> Any:
        """Wait for a value. Raises RankError when the others have failed or are gone."""
        while not self._store.check([name]):
            self._check()
            time.sleep(0.05)
        return json.loads(self._store.get(name))

    def compare(self, facts: Mapping[str, Any]) -> None:
        """Refuse ranks that were started differently. Raises ConfigError with the first value that differs."""
        own = {name: json.loads(json.dumps(value, default=str)) for name, value in facts.items()}
        if self.place.leads:
            self.say("facts", own)
        first = self.hear("facts")
        for name in {**first, **own}:
            if first.get(name) != own.get(name):
                raise ConfigError(
                    f"rank {self.place.index} on {socket.gethostname()} has {name}={own.get(name)!r}, rank 0 has "
                    f"{first.get(name)!r}: start all ranks with the same command, version and cache"
                )
        self.ranks.all(True)  # nothing is begun before all agree

    # -- failures --------------------------------------------------------------------------------------------------

    @contextmanager
    def told(self) -> Iterator[None]:
        """Context manager: what ends this rank is told to the others."""
        try:
            yield
        except RankError:
            raise
        except BaseException as error:
            with suppress(RuntimeError):
                self.say(f"failed/{self.place.index}", one_line(error) or type(error).__name__)
            raise

    def _check(self) -> None:
        """Raise RankError if a rank has failed or is gone."""
        if (text := self._told()) is not None:
            raise RankError(text)
        if who := self._hearts.unheard(self.place.timeout):
            raise RankError(gone(who))

    def _told(self) -> str | None:
        for index in range(self.place.n):
            if index != self.place.index and self._store.check([f"failed/{index}"]):
                return f"rank {index} stopped: {json.loads(self._store.get(f'failed/{index}'))}"
        return None

    def _failed(self, error: RuntimeError) -> Exception:
        """Why a reduction failed: what a rank has told, else which of them has no heartbeat any more."""
        for _ in range(2 * BEATS_MISSED):
            with suppress(RuntimeError):
                if (text := self._told()) is not None:
                    return RankError(text)
            if who := self._hearts.unheard(BEATS_MISSED * BEAT):
                return RankError(gone(who))
            time.sleep(BEAT)
        return RankError(f"the ranks cannot reach each other any more: {one_line(error)}")

    def watch(self, wanted: bool) -> None:
        """Whether a silent rank ends this one: while it needs the others."""
        self._hearts.watches = wanted

    def close(self, *, all_there: bool = True) -> None:
        """Leave. Ranks that are gone are not waited for unless `all_there`."""
        self._hearts.stop()
        if all_there and distributed.is_initialized():
            distributed.destroy_process_group()


@contextmanager
def joined(place: Place, device: str) -> Iterator[World]:
    """Meet the other ranks. Raises RankError with those that have not come in time."""
    on_gpu = device.startswith("cuda")
    name = meet(place)
    world = World(place, store_of(place, name, timedelta(seconds=place.timeout)), name)
    try:
        with world.told():
            store = store_of(place, f"{name}/group", timedelta(seconds=place.timeout))
            connect(place, store, "cpu:gloo,cuda:nccl" if on_gpu else "gloo")
            yield world
            world.ranks.all(True)  # nobody leaves before all have come so far
    except BaseException:
        world.close(all_there=not on_gpu)  # NCCL would wait for those that are gone
        raise
    world.close()


def pin_device(place: Place, device: str) -> None:
    """Make `cuda` the GPU of this rank. Raises ConfigError where that is missing, or another job uses it."""
    if not device.startswith("cuda"):
        return
    if ":" in device:
        raise ConfigError(f"device={device!r} with {place.n} ranks: expected cuda or auto, each rank takes its own GPU")
    if place.local >= (count := torch.cuda.device_count()):
        raise ConfigError(
            f"rank {place.index} is number {place.local} on {socket.gethostname()}, which has {count} GPUs: "
            "start as many ranks per host as it has GPUs (--nproc-per-node)"
        )
    torch.cuda.set_device(place.local)
    check_usable(f"cuda:{place.local}")
