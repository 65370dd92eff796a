"""Where the rows of a pool are taken from: the memory maps themselves, or a copy of the pool on a GPU.

With `loader.py` the only file of this package that imports torch. Shapes: P rows of a pool, B of a batch, D = d_in.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.order import Order, PoolPlan

STAGING_BYTES = 64 * 2**20  # each of the two pinned buffers of a hook point
FEW_PARTS = 4  # index_select shares few large parts among its own threads; many small ones are shared out here

Shards = Mapping[str, Sequence[NDArray[Any]]]  # hook point -> one array per pinned shard, as integers of the same size

_TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_INTEGERS = {4: np.int32, 2: np.int16}


def as_integers(rows: NDArray[Any]) -> NDArray[Any]:
    """The same bytes as integers: numpy copies them plainly, and torch cannot wrap a bfloat16 of ml_dtypes."""
    return np.asarray(rows).view(_INTEGERS[rows.dtype.itemsize])


def as_tensor(rows: NDArray[Any]) -> Tensor:
    """Integers of a read-only map as a tensor over the same bytes, which nothing here writes to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(rows)


class PoolRows(Protocol):
    """The rows of one pool."""

    def take(self, hook: str, index: NDArray[np.int64]) -> Tensor:
        """Rows (B, D) of a hook point in the storage dtype; the index is ascending and counts in disk order."""

    def release(self) -> None:
        """The pool is used up."""


class HostRows:
    """Rows are copied straight from the memory maps into a batch: each byte moves once."""

    def __init__(
        self, plan: PoolPlan, shards: Mapping[str, Sequence[Tensor]], dtype: str, executor: Executor, n_threads: int
    ) -> None:
        self._shards, self._dtype, self._executor, self._n_threads = shards, _TORCH_DTYPES[dtype], executor, n_threads
        self._parts = [part.shard for part in plan.parts]
        self._starts = np.cumsum([0, *(part.n_rows for part in plan.parts)])
        self._offsets = plan.row_ids([0] * (max(self._parts, default=0) + 1))  # in their shards

    def take(self, hook: str, index: NDArray[np.int64]) -> Tensor:
        """See `PoolRows`."""
        shards = self._shards[hook]
        out = torch.empty(len(index), shards[0].shape[1], dtype=self._dtype)
        target, offsets = out.view(shards[0].dtype), torch.from_numpy(self._offsets[index])
        bounds = np.searchsorted(index, self._starts).tolist()
        tasks = [
            (shards[shard], offsets[lo:hi], target[lo:hi])
            for shard, lo, hi in zip(self._parts, bounds[:-1], bounds[1:], strict=True)
            if lo < hi
        ]
        if len(tasks) <= FEW_PARTS:
            _take(tasks)
        else:
            for _ in self._executor.map(_take, (tasks[i :: self._n_threads] for i in range(self._n_threads))):
                pass
        return out

    def release(self) -> None:
        """Nothing is held."""


class CudaBuffer:
    """A pool in device memory. Copies run on a side stream; events order them against the consumer's stream."""

    def __init__(self, order: Order, widths: Mapping[str, int], dtype: str, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._filled = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._drained: torch.cuda.Event | None = None
        self._staging: dict[str, list[Tensor]] = {}
        self._copied: dict[str, list[torch.cuda.Event]] = {}
        self.rows: dict[str, Tensor] = {}
        kind, n_rows = _TORCH_DTYPES[dtype], order.max_pool_rows
        for hook, d in widths.items():
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

    def take(self, hook: str, index: NDArray[np.int64]) -> Tensor:
        """See `PoolRows`; runs on the consumer's stream."""
        torch.cuda.current_stream(self.device).wait_event(self._filled)
        return torch.index_select(self.rows[hook], 0, torch.from_numpy(index).to(self.device))

    def release(self) -> None:
        """See `PoolRows`."""
        self._drained = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._drained.record(torch.cuda.current_stream(self.device))


def n_copy_threads(device: torch.device) -> int:
    """Threads that copy rows: few beside a training that computes on the CPU, several to feed a GPU."""
    n_cores = os.cpu_count() or 1
    return min(8, max(n_cores // 2, 2)) if device.type == "cuda" else min(4, max(n_cores // 4, 2))


def _take(tasks: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Copy rows by index. numpy's take holds the interpreter's lock: two threads were no faster than one."""
    for source, index, out in tasks:
        torch.index_select(source, 0, index, out=out)


def _as_numpy(rows: Tensor) -> NDArray[Any]:
    kind = torch.int32 if rows.dtype.itemsize == 4 else torch.int16
    out: NDArray[Any] = rows.view(kind).numpy()
    return out
