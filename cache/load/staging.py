"""Where the rows of a pool are taken from: the memory maps themselves, or a copy of the pool on a GPU.

Shapes: P rows of a pool, B of a batch, D = d_in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_granary.cache.format.storage import Storage
from sae_granary.cache.load.decode import torch_dtype
from sae_granary.cache.load.order import Order, PoolPlan

STAGING_BYTES = 64 * 2**20  # each of the two pinned buffers of a hook point

Shards = Mapping[str, Sequence[NDArray[Any]]]  # name -> one array per pinned shard, as integers of the same size


class PoolRows(Protocol):
    """The rows of one pool."""

    def take(self, hook: str, index: NDArray[np.int64]) -> Callable[[], Tensor]:
        """Rows (B, D) of a hook point as they are stored, by ascending addresses (see `cache.load.pools`).

        Their memory is taken now, in the consumer's thread; they are there when the call returned is over.
        """

    def release(self) -> None:
        """The pool is used up."""


class HostRows:
    """Copies rows directly from the memory maps into a batch: each byte moves once."""

    def __init__(self, shards: Shards, lengths: Sequence[int], kinds: Mapping[str, Storage]) -> None:
        self._shards, self._dtypes = shards, {name: torch_dtype(kind) for name, kind in kinds.items()}
        self._ends: NDArray[np.int64] = np.cumsum(lengths, dtype=np.int64)
        self.starts: NDArray[np.int64] = self._ends - np.array(lengths, dtype=np.int64)  # addresses of the first rows

    def shard_of(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shard of each address."""
        return np.searchsorted(self._ends, index, side="right")

    def take(self, hook: str, index: NDArray[np.int64]) -> Callable[[], Tensor]:
        """See `PoolRows`. malloc has an arena per thread, and blocks of several threads would be fresh too often."""
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


class CudaBuffer:
    """A pool in device memory. Copies run on a side stream; events order them with the consumer's stream."""

    def __init__(
        self, order: Order, widths: Mapping[str, int], kinds: Mapping[str, Storage], device: torch.device
    ) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._filled = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._drained: torch.cuda.Event | None = None
        self._staging: dict[str, list[Tensor]] = {}
        self._copied: dict[str, list[torch.cuda.Event]] = {}
        self.rows: dict[str, Tensor] = {}
        n_rows = order.max_pool_rows
        for hook, d in widths.items():
            kind = torch_dtype(kinds[hook])
            n_staged = min(n_rows, max(STAGING_BYTES // (d * kind.itemsize), order.block_rows))
            self.rows[hook] = torch.empty(n_rows, d, dtype=kind, device=device)
            self._staging[hook] = [torch.empty(n_staged, d, dtype=kind, pin_memory=True) for _ in range(2)]
            self._copied[hook] = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def fill(self, plan: PoolPlan, shards: Shards, executor: Executor) -> None:
        """Copy the rows of a pool in, in disk order (background thread)."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            if self._drained is not None:
                self._stream.wait_event(self._drained)
            for hook in self.rows:
                self._fill_hook(hook, plan, shards[hook], executor)
            self._filled.record(self._stream)

    def _fill_hook(self, hook: str, plan: PoolPlan, shards: Sequence[NDArray[Any]], executor: Executor) -> None:
        """While one staging buffer travels, the other is filled."""
        rows, staging, copied = self.rows[hook], self._staging[hook], self._copied[hook]
        done = 0
        for i, piece in enumerate(plan.split(len(staging[0]))):
            copied[i % 2].synchronize()  # returns at once before the first record
            host = staging[i % 2][: piece.n_rows]
            piece.gather(shards, _as_numpy(host), executor)
            rows[done : done + piece.n_rows].copy_(host, non_blocking=True)
            copied[i % 2].record(self._stream)
            done += piece.n_rows

    def take(self, hook: str, index: NDArray[np.int64]) -> Callable[[], Tensor]:
        """See `PoolRows`; launched now, on the consumer's stream."""
        torch.cuda.current_stream(self.device).wait_event(self._filled)
        rows = torch.index_select(self.rows[hook], 0, torch.from_numpy(index).to(self.device))
        return lambda: rows

    def release(self) -> None:
        """See `PoolRows`."""
        self._drained = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._drained.record(torch.cuda.current_stream(self.device))


def n_copy_threads(device: torch.device) -> int:
    """Threads that copy rows: few beside a training that computes on the CPU, several to feed a GPU."""
    n_cores = os.cpu_count() or 1
    return min(8, max(n_cores // 2, 2)) if device.type == "cuda" else min(4, max(n_cores // 4, 1))


def _as_numpy(rows: Tensor) -> NDArray[Any]:
    """The same memory as integers, as the memory maps are read (see `Storage.integers`)."""
    integers: NDArray[Any] = rows.view(getattr(torch, f"int{8 * rows.dtype.itemsize}")).numpy()
    return integers
