"""Where the rows of a pool are taken from: the memory maps themselves, or a copy of the pool on a GPU.

Shapes: P rows of a pool, B of a batch, D = d_in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_granary.cache.format.storage import Storage
from sae_granary.cache.load.decode import torch_dtype
from sae_granary.cache.load.order import Order, PoolPlan, Stored

STAGING_BYTES = 64 * 2**20  # each of the two pinned buffers of a hook point
CHUNK_BYTES = 2**21  # of one copying task: a staging buffer is many of them, so that all threads end together
FREE_CORES = 2  # beside the copying threads: one launches the training's work, one plans

InMemory = Mapping[str, Sequence[NDArray[Any]]]  # name -> one array per pinned shard, as integers of the same size


class PoolRows(Protocol):
    """The rows of one pool."""

    def take(self, hook: str, order: NDArray[np.int64], lo: int, hi: int) -> Callable[[], Tensor]:
        """Rows (B, D) of a hook point as they are stored, at the addresses order[lo:hi] (see `cache.load.pools`).

        `order` is the pool's, ascending inside the slice. Their memory is taken now, in the consumer's thread; they are
        there when the call returned is over.
        """

    def release(self) -> None:
        """The pool is used up."""


class HostRows:
    """Copies rows directly from the memory maps into a batch: each byte moves once."""

    def __init__(self, shards: InMemory, lengths: Sequence[int], kinds: Mapping[str, Storage]) -> None:
        self._shards, self._dtypes = shards, {name: torch_dtype(kind) for name, kind in kinds.items()}
        self._ends: NDArray[np.int64] = np.cumsum(lengths, dtype=np.int64)
        self.starts: NDArray[np.int64] = self._ends - np.array(lengths, dtype=np.int64)  # addresses of the first rows

    def shard_of(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shard of each address."""
        return np.searchsorted(self._ends, index, side="right")

    def take(self, hook: str, order: NDArray[np.int64], lo: int, hi: int) -> Callable[[], Tensor]:
        """See `PoolRows`. malloc has an arena per thread, and blocks of several threads would be fresh too often."""
        index = order[lo:hi]
        out = torch.empty(len(index), self._shards[hook][0].shape[1], dtype=self._dtypes[hook])
        return lambda: self.copy(hook, index, out)

    def copy(self, hook: str, index: NDArray[np.int64], out: Tensor) -> Tensor:
        """Fill `out`, without the interpreter's lock: other threads copy other batches meanwhile."""
        shards = self._shards[hook]
        target, lo = _as_numpy(out), 0
        for shard, hi in enumerate(np.searchsorted(index, self._ends).tolist()):
            if lo < hi:
                offsets = index[lo:hi] - self.starts[shard] if shard else index[lo:hi]
                np.take(shards[shard], offsets, axis=0, out=target[lo:hi], mode="clip")  # other modes copy twice
            lo = hi
        return out

    def release(self) -> None:
        """Nothing is held."""


class DeviceBuffer:
    """A pool in device memory. Copies run on a side stream; events order them with the consumer's stream.

    On a CPU it is memory, for shards that are too many to map; reading them waits for the disk, not for the processor.

    Neither filling it nor taking batches from it waits for what the consumer has launched on the device.
    """

    def __init__(
        self, order: Order, widths: Mapping[str, int], kinds: Mapping[str, Storage], device: torch.device
    ) -> None:
        self.device = device
        self._side = SideStream(device)
        self._filled = self._side.event()
        self._drained: AnyEvent | None = None
        self._staging: dict[str, list[Tensor]] = {}
        self._copied: dict[str, list[AnyEvent]] = {}
        self.rows: dict[str, Tensor] = {}
        n_rows = order.max_pool_rows
        self._order = torch.empty(n_rows, dtype=torch.int64, device=device)
        for hook, d in widths.items():
            kind = torch_dtype(kinds[hook])
            n_staged = min(n_rows, max(STAGING_BYTES // (d * kind.itemsize), order.block_rows))
            self.rows[hook] = torch.empty(n_rows, d, dtype=kind, device=device)
            self._staging[hook] = [self._side.pinned(n_staged, d, kind) for _ in range(2)]
            self._copied[hook] = [self._side.event() for _ in range(2)]

    def fill(self, plan: PoolPlan, order: NDArray[np.int64], shards: Mapping[str, Stored], executor: Executor) -> None:
        """Copy the rows of a pool in, in disk order, and the order of delivery (background thread)."""
        with self._side:
            if self._drained is not None:
                self._side.wait(self._drained)
            for hook in self.rows:
                self._fill_hook(hook, plan, shards[hook], executor)
            # From pinned memory: from other memory every batch would wait for the device to finish the step before.
            host = self._side.pinned(len(order), 0, torch.int64).copy_(torch.from_numpy(order))
            self._order[: len(order)].copy_(host, non_blocking=True)
            self._side.record(self._filled)

    def _fill_hook(self, hook: str, plan: PoolPlan, shards: Stored, executor: Executor) -> None:
        """While one staging buffer travels, the other is filled; the threads begin it before the first is full."""
        rows, staging, copied = self.rows[hook], self._staging[hook], self._copied[hook]
        if self.device.type == "cpu" and not isinstance(shards, Sequence):
            for read in [executor.submit(copy) for copy in shards.copies(plan, _as_numpy(rows[: plan.n_rows]))]:
                read.result()
            return
        done, begun = 0, _Begun([], rows[:0], rows[:0], copied[1])
        for i, piece in enumerate(plan.split(len(staging[0]))):
            copied[i % 2].synchronize()  # returns at once before the first record
            host = staging[i % 2][: piece.n_rows]
            copies = [executor.submit(copy) for copy in piece.copies(shards, _as_numpy(host), CHUNK_BYTES)]
            self._send(begun)
            begun = _Begun(copies, host, rows[done : done + piece.n_rows], copied[i % 2])
            done += piece.n_rows
        self._send(begun)

    def _send(self, begun: _Begun) -> None:
        for copied in begun.copies:
            copied.result()
        begun.target.copy_(begun.host, non_blocking=True)
        self._side.record(begun.arrived)

    def take(self, hook: str, order: NDArray[np.int64], lo: int, hi: int) -> Callable[[], Tensor]:
        """See `PoolRows`; launched now, on the consumer's stream."""
        self._side.let_consumer_wait(self._filled)
        rows = torch.index_select(self.rows[hook], 0, self._order[lo:hi])
        return lambda: rows

    def release(self) -> None:
        """See `PoolRows`."""
        self._drained = self._side.event()
        self._side.record_consumer(self._drained)


@dataclass(frozen=True, eq=False)
class _Begun:
    """A staging buffer that threads fill, and where it goes."""

    copies: list[Future[None]]
    host: Tensor
    target: Tensor
    arrived: AnyEvent


class AnyEvent(Protocol):
    """What `SideStream` makes."""

    def synchronize(self) -> None:
        """Wait until what was launched before the event was recorded is over."""


class SideStream:
    """A stream beside the consumer's. On a CPU, where nothing is launched, everything is over at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._entered = ExitStack()

    def __enter__(self) -> None:
        """Launch on this stream inside the block."""
        if self._stream is not None:
            self._entered.enter_context(torch.cuda.device(self._device))
            self._entered.enter_context(torch.cuda.stream(self._stream))

    def __exit__(self, *_: object) -> None:
        self._entered.close()

    def pinned(self, n_rows: int, d: int, dtype: torch.dtype) -> Tensor:
        """Host memory (n_rows, d), or (n_rows,) for d = 0, that a device copies from by itself."""
        shape = (n_rows, d) if d else (n_rows,)
        return torch.empty(shape, dtype=dtype, pin_memory=self._stream is not None)

    def event(self) -> AnyEvent:
        """An event that is over until it is recorded."""
        made: AnyEvent = _Over() if self._stream is None else torch.cuda.Event()  # type: ignore[no-untyped-call]
        return made

    def record(self, event: Any) -> None:
        """Record what was launched on this stream so far."""
        if self._stream is not None:
            event.record(self._stream)

    def record_consumer(self, event: Any) -> None:
        """Record what was launched on the current stream so far."""
        if self._stream is not None:
            event.record(torch.cuda.current_stream(self._device))

    def wait(self, event: Any) -> None:
        """Launch nothing further on this stream before the event is over; the host does not wait."""
        if self._stream is not None:
            self._stream.wait_event(event)

    def let_consumer_wait(self, event: Any) -> None:
        """The same for the current stream."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


class _Over:
    def synchronize(self) -> None:
        """Nothing to wait for."""


def n_copy_threads(device: torch.device) -> int:
    """Threads that copy rows: few beside a training that computes on the CPU, most cores to feed a GPU."""
    n_cores = os.cpu_count() or 1
    return min(16, max(n_cores - FREE_CORES, 2)) if device.type == "cuda" else min(4, max(n_cores // 4, 1))


def is_staged(device: torch.device) -> bool:
    """Whether pools are copied to the device before batches are taken from them."""
    return device.type == "cuda"


def _as_numpy(rows: Tensor) -> NDArray[Any]:
    """The same memory as integers, as the memory maps are read (see `Storage.integers`)."""
    integers: NDArray[Any] = rows.view(getattr(torch, f"int{8 * rows.dtype.itemsize}")).numpy()
    return integers
