"""The ranks of a training: how they meet, what they tell each other, and which of them is gone.

They meet at a TCP store, which torchrun's agent serves (without an agent, rank 0). In it each rank leaves where it
runs, a beat every half second, what it was started with, and why it failed. All of this is text; tensors go through
torch.distributed (`Ranks`), with gloo on the CPU and NCCL on GPUs.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from sae_granary.common.errors import ConfigError, one_line
from sae_granary.sae_core.ranks.reduce import Ranks
from sae_granary.train.errors import RankError
from sae_granary.train.ranks.place import Place

BEAT = 0.5  # seconds
BEATS_MISSED = 10  # in a row, after a connection broke: the rank is gone
_meetings = itertools.count(1)  # of this process: each has names of its own in the store
_served: list[Store] = []  # by this process, to its end: others may still be reading
GRACE = 5.0  # seconds, beyond the timeout, in which a rank that waits for a text ends by itself
SLOWEST = timedelta(days=1)  # of a reduction: rank 0 may evaluate or write meanwhile, its beats go on


class World:
    """The ranks that joined. `ranks` reduces tensors over them."""

    def __init__(self, place: Place, store: Store, name: str) -> None:
        self.place, self._store = place, store
        self.ranks = Ranks(place.index, place.n, self._failed)
        self._hearts = _Hearts(place, _connect(place, name, SLOWEST))

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
        if gone := self._hearts.silent(self.place.timeout):
            raise RankError(self._gone(gone))

    def _told(self) -> str | None:
        for index in range(self.place.n):
            if index != self.place.index and self._store.check([f"failed/{index}"]):
                return f"rank {index} stopped: {json.loads(self._store.get(f'failed/{index}'))}"
        return None

    def _gone(self, indices: list[int]) -> str:
        who = ", ".join(f"rank {i} ({self._hearts.where(i)})" for i in indices)
        return f"{who} is gone; start the ranks again to continue from the last checkpoint (`run` with --resume auto)"

    def _failed(self, error: RuntimeError) -> Exception:
        """Why a reduction failed: what a rank has told, else which of them has no heartbeat any more."""
        until = time.monotonic() + 2 * BEATS_MISSED * BEAT
        while time.monotonic() < until:
            with suppress(RuntimeError):
                if (text := self._told()) is not None:
                    return RankError(text)
            if gone := self._hearts.silent(BEATS_MISSED * BEAT):
                return RankError(self._gone(gone))
            time.sleep(BEAT)
        return RankError(f"the ranks cannot reach each other any more: {one_line(error)}")

    def watch(self, wanted: bool) -> None:
        """Whether a silent rank ends this one: while it takes steps with the others."""
        self._hearts.watches = wanted

    def close(self, *, all_there: bool = True) -> None:
        """Leave. Ranks that are gone are not waited for unless `all_there`."""
        self._hearts.stop()
        if all_there and distributed.is_initialized():
            distributed.destroy_process_group()


@contextmanager
def joined(place: Place, device: str) -> Iterator[World]:
    """Meet the other ranks. Raises RankError with those that have not come in time."""
    name = f"granary/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_meetings)}"
    on_gpu = device.startswith("cuda")
    world = World(place, _meet(place, name), name)
    try:
        with world.told():
            store = _connect(place, f"{name}/group", timedelta(seconds=place.timeout))
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            distributed.init_process_group(backend, store=store, rank=place.index, world_size=place.n, timeout=SLOWEST)
            yield world
            world.ranks.all(True)  # nobody leaves before all have come so far
    except BaseException:
        world.close(all_there=not on_gpu)  # NCCL would wait for those that are gone
        raise
    world.close()


def _connect(place: Place, name: str, timeout: timedelta) -> Store:
    return PrefixStore(name, TCPStore(place.address, place.port, None, False, timeout, wait_for_workers=False))


def _meet(place: Place, name: str) -> Store:
    """Wait until every rank has left its name in the store."""
    serves = place.leads and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=place.timeout)
    try:
        if serves and not _served:
            _served.append(TCPStore(place.address, place.port, None, True, limit, wait_for_workers=False))
        store = _connect(place, name, limit)
        store.set(f"here/{place.index}", json.dumps(f"{socket.gethostname()}, process {os.getpid()}"))
    except RuntimeError as error:
        raise RankError(
            f"rank {place.index} cannot reach rank 0 at {place.address}:{place.port} within {place.timeout:g} s: "
            f"{one_line(error)[:200]}"
        ) from None
    try:
        store.wait([f"here/{i}" for i in range(place.n)], limit)
    except RuntimeError:
        missing = [str(i) for i in range(place.n) if not store.check([f"here/{i}"])]
        raise RankError(
            f"rank {', '.join(missing)} of {place.n} did not come to {place.address}:{place.port} within "
            f"{place.timeout:g} s: start all ranks, or raise GRANARY_RANK_TIMEOUT"
        ) from None
    return store


class _Hearts:
    """A thread that beats for this rank and listens for the others."""

    def __init__(self, place: Place, store: Store) -> None:
        self._place, self._store = place, store
        self._seen = {i: (b"", time.monotonic()) for i in range(place.n) if i != place.index}
        self._names: dict[int, str] = {}
        self.watches = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="granary-beat", daemon=True)
        self._thread.start()

    def where(self, index: int) -> str:
        """Host and process of a rank."""
        return self._names.get(index, "unknown host")

    def silent(self, seconds: float) -> list[int]:
        """Ranks that have not beaten for so long."""
        now = time.monotonic()
        return [i for i, (_, since) in sorted(self._seen.items()) if now - since > seconds]

    def _end_if_stuck(self) -> None:
        """End the process where a rank was silent for so long that this one waits for it in a reduction."""
        if self.watches and (gone := self.silent(self._place.timeout + GRACE)):
            who = ", ".join(f"rank {i} ({self.where(i)})" for i in gone)
            text = f"error: {who} has not answered for {self._place.timeout:g} s; start the ranks again (`run` with "
            text += "--resume auto)\n"
            os.write(2, text.encode())
            os._exit(RankError.exit_code)

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        count = 0
        with suppress(RuntimeError):
            self._names = {i: json.loads(self._store.get(f"here/{i}")) for i in range(self._place.n)}
        while not self._stop.wait(BEAT):
            count += 1
            with suppress(RuntimeError):  # the store is served elsewhere: without it nobody is heard
                self._store.set(f"beat/{self._place.index}", str(count))
                for i, (last, _) in list(self._seen.items()):
                    if self._store.check([f"beat/{i}"]) and (found := self._store.get(f"beat/{i}")) != last:
                        self._seen[i] = (found, time.monotonic())
            self._end_if_stuck()


def pin_device(place: Place, device: str) -> None:
    """Make `cuda` the GPU of this rank. Raises ConfigError where there are fewer GPUs than ranks."""
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
