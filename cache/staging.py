"""Buffers that a pool is assembled into: host memory, or device memory through pinned staging and a side stream.

With `loader.py` the only file of this package that imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.order import Order, PoolPlan

STAGING_BYTES = 64 * 2**20  # each of the two pinned buffers of a hook point

Shards = Mapping[str, Sequence[NDArray[Any]]]  # hook point -> one array per pinned shard

_TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_INTEGERS = {4: np.int32, 2: np.int16}


def as_integers(rows: NDArray[Any]) -> NDArray[Any]:
    """The same bytes as integers: numpy copies them plainly, and torch cannot wrap a bfloat16 of ml_dtypes."""
    return np.asarray(rows).view(_INTEGERS[rows.dtype.itemsize])


class Buffer(Protocol):
    """Holds one pool at a time."""

    @property
    def rows(self) -> Mapping[str, Tensor]:
        """Hook point -> (P, D) in the storage dtype."""

    def fill(self, plan: PoolPlan, shards: Shards, executor: Executor | None) -> None:
        """Copy the rows of a pool in, in disk order (background thread)."""

    def index(self, order: NDArray[np.int64]) -> Tensor:
        """Bring an index to where the rows are (background thread)."""

    def acquire(self, index: Tensor) -> None:
        """Before the first use of a filled buffer and its index (consumer)."""

    def release(self) -> None:
        """After the last use: the buffer will be filled again (consumer)."""


class HostBuffer:
    """A pool in host memory."""

    def __init__(self, n_rows: int, widths: Mapping[str, int], dtype: str) -> None:
        self.rows = {hook: torch.empty(n_rows, d, dtype=_TORCH_DTYPES[dtype]) for hook, d in widths.items()}

    def fill(self, plan: PoolPlan, shards: Shards, executor: Executor | None) -> None:
        """See `Buffer`."""
        for hook, rows in self.rows.items():
            plan.gather(shards[hook], _as_numpy(rows)[: plan.n_rows], executor)

    def index(self, order: NDArray[np.int64]) -> Tensor:
        """See `Buffer`."""
        return torch.from_numpy(order)

    def acquire(self, index: Tensor) -> None:
        """Nothing to wait for."""

    def release(self) -> None:
        """Nothing to record."""


class CudaBuffer:
    """A pool in device memory. Copies run on a side stream; events order them against the consumer's stream."""

    def __init__(
        self, n_rows: int, block_rows: int, widths: Mapping[str, int], dtype: str, device: torch.device
    ) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._filled = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._drained: torch.cuda.Event | None = None
        self._staging: dict[str, list[Tensor]] = {}
        self._copied: dict[str, list[torch.cuda.Event]] = {}
        self.rows: dict[str, Tensor] = {}
        for hook, d in widths.items():
            kind = _TORCH_DTYPES[dtype]
            n_staged = min(n_rows, max(STAGING_BYTES // (d * kind.itemsize), block_rows))
            self.rows[hook] = torch.empty(n_rows, d, dtype=kind, device=device)
            self._staging[hook] = [torch.empty(n_staged, d, dtype=kind, pin_memory=True) for _ in range(2)]
            self._copied[hook] = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def fill(self, plan: PoolPlan, shards: Shards, executor: Executor | None) -> None:
        """See `Buffer`. While one staging buffer travels, the other is filled."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            if self._drained is not None:
                self._stream.wait_event(self._drained)
            for hook, rows in self.rows.items():
                self._fill_hook(hook, rows, plan, shards[hook], executor)
            self._filled.record(self._stream)

    def _fill_hook(
        self, hook: str, rows: Tensor, plan: PoolPlan, shards: Sequence[NDArray[Any]], executor: Executor | None
    ) -> None:
        staging, copied = self._staging[hook], self._copied[hook]
        done = 0
        for i, piece in enumerate(plan.split(len(staging[0]))):
            copied[i % 2].synchronize()  # returns at once before the first record
            host = staging[i % 2][: piece.n_rows]
            piece.gather(shards, _as_numpy(host), executor)
            rows[done : done + piece.n_rows].copy_(host, non_blocking=True)
            copied[i % 2].record(self._stream)
            done += piece.n_rows

    def index(self, order: NDArray[np.int64]) -> Tensor:
        """See `Buffer`."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            index = torch.from_numpy(order).to(self.device)
            self._filled.record(self._stream)
        return index

    def acquire(self, index: Tensor) -> None:
        """See `Buffer`."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self._filled)
        index.record_stream(stream)  # it was allocated on the side stream

    def release(self) -> None:
        """See `Buffer`."""
        self._drained = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._drained.record(torch.cuda.current_stream(self.device))


def make_buffer(order: Order, widths: Mapping[str, int], dtype: str, device: torch.device) -> Buffer:
    """A buffer for one pool: on the device itself if it is a CUDA device, else on the host."""
    if device.type == "cuda":
        return CudaBuffer(order.max_pool_rows, order.block_rows, widths, dtype, device)
    return HostBuffer(order.max_pool_rows, widths, dtype)


def n_copy_threads(device: torch.device) -> int:
    """Threads that copy shards: one beside a training that computes on the CPU, several to feed a GPU."""
    return min(8, max((os.cpu_count() or 1) // 2, 1)) if device.type == "cuda" else 1


def _as_numpy(rows: Tensor) -> NDArray[Any]:
    kind = torch.int32 if rows.dtype.itemsize == 4 else torch.int16
    out: NDArray[Any] = rows.view(kind).numpy()
    return out
