"""How the ranks find each other: a TCP store for texts, and connections between all of them for tensors."""

from __future__ import annotations

import json
import os
import secrets
import socket
import struct
import time
from datetime import timedelta

from torch import distributed
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.distributed_c10d import _set_pg_timeout

from sae_granary.common.errors import one_line
from sae_granary.train.errors import RankError
from sae_granary.train.ranks.place import Place

SLOWEST = timedelta(days=1)  # of a reduction: rank 0 may evaluate or write meanwhile, its beats go on
_PREFIX = "granary"
_PAUSE = 0.05  # seconds
_INTERFACE = "GLOO_SOCKET_IFNAME"
_LOCAL = ("localhost", "127.0.0.1")
_SIOCGIFADDR = 0x8915  # Linux: the address of an interface
_served: list[Store] = []  # by this process, to its end: others may still be reading


def store_of(place: Place, name: str, timeout: timedelta) -> Store:
    """A connection of its own to the part `name` of the store. Raises RuntimeError."""
    return PrefixStore(name, TCPStore(place.address, place.port, None, False, timeout, wait_for_workers=False))


def meet(place: Place) -> str:
    """Wait until all ranks are there; returns the name of their part of the store.

    The store may hold what ranks left that have ended: after the failure of a host torchrun starts all of them again,
    and counts restarts by host. So rank 0 invents a name each time, and says who has come by a number of each process.
    Raises RankError with the ranks that have not come in time.
    """
    serves = place.leads and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=place.timeout)
    try:
        if serves and not _served:
            _served.append(TCPStore(place.address, place.port, None, True, limit, wait_for_workers=False))
        store = store_of(place, _PREFIX, limit)
        return f"{_PREFIX}/{_call(place, store) if place.leads else _answer(place, store)}"
    except RuntimeError as error:  # also of a store that ends while this rank waits
        raise _unreachable(place, error) from None


def _call(place: Place, store: Store) -> str:
    """Rank 0: give the meeting a name, and wait for the others."""
    name = secrets.token_hex(8)
    _come(place, store, name, name)
    store.set("meeting", name)
    came = [f"{name}/came/{i}" for i in range(place.n)]
    until = time.monotonic() + place.timeout
    while not store.check(came):
        if time.monotonic() > until:
            raise _missing(place, [i for i, key in enumerate(came) if not store.check([key])])
        time.sleep(_PAUSE)
    store.set(f"{name}/all", json.dumps([store.get(key).decode() for key in came]))
    return name


def _answer(place: Place, store: Store) -> str:
    """The other ranks: come to the meeting that rank 0 has named last, until it counts this process."""
    own, name = secrets.token_hex(8), ""
    until = time.monotonic() + place.timeout
    while True:
        if store.check(["meeting"]) and (found := store.get("meeting").decode()) != name:
            name = found
            _come(place, store, name, own)
        if name and store.check([f"{name}/all"]) and json.loads(store.get(f"{name}/all"))[place.index] == own:
            return name
        if time.monotonic() > until:
            absent = [i for i in range(place.n) if not (name and store.check([f"{name}/came/{i}"]))]
            raise _missing(place, [0] if not name else absent or [0])
        time.sleep(_PAUSE)


def _come(place: Place, store: Store, name: str, own: str) -> None:
    store.set(f"{name}/here/{place.index}", json.dumps(f"{socket.gethostname()}, process {os.getpid()}"))
    store.set(f"{name}/came/{place.index}", own)


def connect(place: Place, store: Store, backend: str) -> None:
    """Connect all ranks with each other. Raises RankError where that fails, or takes longer than the timeout."""
    if os.environ.get(_INTERFACE) is None and (interface := _interface_to(place)):
        os.environ[_INTERFACE] = interface  # gloo's own choice needs a host name that resolves
    limit = timedelta(seconds=place.timeout)
    try:
        distributed.init_process_group(backend, store=store, rank=place.index, world_size=place.n, timeout=limit)
    except RuntimeError as error:
        chosen = os.environ.get(_INTERFACE, "the one of the host name")
        raise RankError(
            f"rank {place.index} on {socket.gethostname()} cannot connect to the other ranks within {place.timeout:g} "
            f"s through the network interface {chosen}: set {_INTERFACE} to one that reaches all hosts "
            f"({one_line(error)[:200]})"
        ) from None
    _set_pg_timeout(SLOWEST)


def _unreachable(place: Place, error: RuntimeError) -> RankError:
    return RankError(
        f"rank {place.index} on {socket.gethostname()} cannot reach rank 0 at {place.address}:{place.port} within "
        f"{place.timeout:g} s: {one_line(error)[:200]}"
    )


def _missing(place: Place, ranks: list[int]) -> RankError:
    return RankError(
        f"rank {', '.join(map(str, ranks))} of {place.n} did not come to {place.address}:{place.port} within "
        f"{place.timeout:g} s: start all ranks, or raise GRANARY_RANK_TIMEOUT"
    )


def _interface_to(place: Place) -> str | None:
    """The network interface through which this host reaches rank 0; None if it is not known (Linux and IPv4 only)."""
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((place.address, place.port))  # sends nothing
            own = probe.getsockname()[0]
            if own.startswith("127.") and place.address not in _LOCAL:
                return None  # a name of this host: the others reach it elsewhere
            for _, name in socket.if_nameindex():
                try:
                    found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                except OSError:  # an interface without an address
                    continue
                if socket.inet_ntoa(found[20:24]) == own:
                    return name
    except (ImportError, OSError):
        pass
    return None
