"""From the device to the cache's rows: casts, sums and copies on a separate stream, then the columns beside them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_granary.cache.format.layout import ArrayLayout, CacheLayout
from sae_granary.cache.format.stats import block_sums
from sae_granary.cache.format.storage import STORAGE
from sae_granary.cache.write.split import split_windows
from sae_granary.common.rows import BlockSums, DocumentRow, Rows
from sae_granary.harvest.device.sums import SumsOnDevice, same_sums
from sae_granary.models.tokens.contexts import Window

if TYPE_CHECKING:
    import torch

MAX_THREADS = 8  # of the writer; those beyond would wait for one file
N_SLOTS = 3  # of pinned memory: one is filled while another waits and one is written
_ROOM = 17 / 16  # of the first buffer, since later ones are a few rows longer and pinning is slow

Part = tuple[int, int, int]  # first row in a buffer, number of rows, rows of their shard before them


@dataclass(frozen=True)
class OnHost:
    """Activations of a buffer as arrays, and sums over blocks of their rows."""

    activations: Mapping[str, Any]
    sums: Mapping[str, Mapping[int, BlockSums]]


def writing(device: str) -> dict[str, Any]:
    """How a cache is written beside a model on this device."""
    if device == "cpu":  # the model needs the cores, also those that would copy rows into the page cache
        return {"direct": True, "n_threads": 1}
    return {"direct": False, "n_threads": min(MAX_THREADS, max(1, (os.cpu_count() or 1) // 2))}


class Places:
    """Where the rows of one buffer after another come in their shards, before they are written."""

    def __init__(self, rows_per_shard: int) -> None:
        self._used, self._rows_per_shard = 0, rows_per_shard

    def parts(self, windows: Sequence[Window], first_row: int) -> list[Part]:
        """The rows of a buffer from a row on, which begins a window, by shard."""
        starts = np.cumsum([0, *(len(window) for window in windows)])
        lengths, parts = np.diff(starts)[starts[:-1] >= first_row], []
        for i, n_rows in enumerate(split_windows(lengths, self._used, self._rows_per_shard)):
            self._used *= i == 0
            if n_rows:
                parts.append((first_row, n_rows, self._used))
            first_row += n_rows
            self._used += n_rows
        self._used %= self._rows_per_shard
        return parts


class HostCopier:
    """Device tensors -> host arrays.

    With `staged` the device casts to the stored type and makes the sums of whole inner chunks, and on CUDA all this
    runs on a separate stream. Without the tensors come as they are. A wrong guess of the places costs time, never a
    byte: sums belong to rows, and the writer makes those that it is not given.
    """

    def __init__(
        self, device: torch.device, layout: CacheLayout | None, say: Callable[[str], None], *, staged: bool
    ) -> None:
        self._device, self._say, self._staged = device, say, staged
        self._arrays: Mapping[str, ArrayLayout] = {} if layout is None else layout.activations
        self._sums = staged and layout is not None and not layout.scales  # those of codes are of the decoded rows
        self._slots: list[dict[str, torch.Tensor]] = [{} for _ in range(N_SLOTS)]
        self._next = 0
        self._compared: set[str] = set()
        self._stream: Any = None

    def __call__(self, tensors: Mapping[str, torch.Tensor], parts: Sequence[Part]) -> OnHost:
        """Arrays that are valid until N_SLOTS - 1 further calls have returned."""
        if not self._staged:
            return OnHost({name: to_numpy(tensor.cpu()) for name, tensor in tensors.items()}, {})
        self._next = (self._next + 1) % N_SLOTS
        with self._on_stream() as wait:
            stored = {name: self._as_stored(name, tensor) for name, tensor in tensors.items()}
            begun = {name: self._begin_sums(name, tensor, parts) for name, tensor in stored.items()}
            hosts = {name: self._host(name, tensor) for name, tensor in stored.items()}
            for name, tensor in stored.items():
                hosts[name].copy_(tensor, non_blocking=True)
            wait()
            sums = {name: {k: v for each in made for k, v in each.to_host().items()} for name, made in begun.items()}
        arrays = {name: to_numpy(host) for name, host in hosts.items()}
        return OnHost(arrays, self._checked(arrays, sums))

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[Callable[[], None]]:
        if self._device.type != "cuda":
            yield lambda: None
            return
        import torch

        self._stream = self._stream or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            yield self._stream.synchronize

    def _as_stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The rows in the stored type; as they are if one does not fit it, so that the writer can name its value."""
        import torch

        array = self._arrays.get(name)
        if array is None or array.storage.scale is not None:
            return tensor
        cast = tensor.to(getattr(torch, array.storage.name))
        return tensor if cast is not tensor and not bool(cast.isfinite().all()) else cast

    def _begin_sums(self, name: str, tensor: torch.Tensor, parts: Sequence[Part]) -> list[SumsOnDevice]:
        import torch

        array = self._arrays.get(name)
        if not self._sums or array is None or tensor.dtype != getattr(torch, array.storage.name):
            return []
        if torch.are_deterministic_algorithms_enabled():  # torch would refuse `cumsum`, though not along rows
            return []
        size, begun = array.inner_rows, []
        for start, n_rows, before in parts:
            first = start + -before % size
            if firsts := range(first, start + n_rows - size + 1, size):
                begun.append(SumsOnDevice(tensor, firsts, size))
        return begun

    def _checked(
        self, arrays: Mapping[str, Any], sums: dict[str, dict[int, BlockSums]]
    ) -> Mapping[str, Mapping[int, BlockSums]]:
        """The sums, unless the device does not add as numpy does, which the first block of each hook point shows."""
        for name in [name for name in sums if sums[name] and name not in self._compared]:
            first, made = next(iter(sums[name].items()))
            self._compared.add(name)
            if np.isfinite(made.square_D).all() and not same_sums(
                made, block_sums(arrays[name][first : first + len(made.square_N)])
            ):
                self._sums = False
                self._say(f"{self._device} does not add in the order of numpy: the CPU makes the statistics")
        return sums if self._sums else {}

    def _host(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Pinned memory of this size; kept, since pinning is slow."""
        import torch

        slot = self._slots[self._next]
        kept = slot.get(name)
        if kept is None or len(kept) < len(tensor) or kept.dtype != tensor.dtype:
            shape = (int(len(tensor) * _ROOM), *tensor.shape[1:])
            kept = slot[name] = torch.empty(shape, dtype=tensor.dtype, pin_memory=self._device.type == "cuda")
        return kept[: len(tensor)]


def to_numpy(tensor: torch.Tensor) -> Any:
    """A host tensor as an array that shares its memory, also of types that numpy alone does not know (bfloat16)."""
    import torch

    storage = STORAGE[str(tensor.dtype).removeprefix("torch.")]
    return tensor.view(getattr(torch, storage.integers.name)).numpy().view(storage.numpy)


def to_rows(windows: Sequence[Window], host: OnHost) -> Rows:
    """Activations with all that is known about their rows."""
    lengths = np.array([len(window) for window in windows])
    starts = np.cumsum(lengths) - lengths
    return Rows(
        activations=host.activations,
        token_id=np.concatenate([window.ids for window in windows]),
        doc_id=np.concatenate([window.doc_id for window in windows]),
        window=np.repeat(np.array([window.number for window in windows], np.uint64), lengths),
        position=(np.arange(lengths.sum()) - np.repeat(starts, lengths)).astype(np.int32),
        doc_position=np.concatenate([window.doc_position for window in windows]),
        flags=np.concatenate([window.flags for window in windows]),
        sums=host.sums,
    )


def documents_from(windows: Sequence[Window], first_row: int) -> list[DocumentRow]:
    """The documents that begin in the windows from a row on."""
    starts = np.cumsum([0, *(len(window) for window in windows)])
    return [
        document
        for window, start in zip(windows, starts, strict=False)
        if start >= first_row
        for document in window.documents
    ]


def timed_event(device: torch.device) -> Any:
    """A CUDA event with a time; None on other devices."""
    if device.type != "cuda":
        return None
    import torch

    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
