"""From the device to the cache's rows: copies on a separate stream, then the columns beside the activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_granary.cache.format.storage import STORAGE
from sae_granary.common.rows import DocumentRow, Rows
from sae_granary.models.tokens.contexts import Window

if TYPE_CHECKING:
    import torch


class HostCopier:
    """Device tensors -> host arrays; on CUDA through pinned memory, on a separate stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned: dict[str, torch.Tensor] = {}
        self._stream: Any = None

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Arrays that are valid until the next call."""
        if self._device.type != "cuda":
            return {name: to_numpy(tensor.cpu()) for name, tensor in tensors.items()}
        import torch

        self._stream = self._stream or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            hosts = {name: self._host(name, tensor) for name, tensor in tensors.items()}
            for name, tensor in tensors.items():
                hosts[name].copy_(tensor, non_blocking=True)
        self._stream.synchronize()
        return {name: to_numpy(host) for name, host in hosts.items()}

    def _host(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Pinned memory of this size; kept, since pinning is slow."""
        import torch

        kept = self._pinned.get(name)
        if kept is None or len(kept) < len(tensor):
            kept = self._pinned[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return kept[: len(tensor)]


def to_numpy(tensor: torch.Tensor) -> Any:
    """A host tensor as an array that shares its memory, also of types that numpy alone does not know (bfloat16)."""
    import torch

    storage = STORAGE[str(tensor.dtype).removeprefix("torch.")]
    return tensor.view(getattr(torch, storage.integers.name)).numpy().view(storage.numpy)


def to_rows(windows: Sequence[Window], activations: Mapping[str, Any]) -> Rows:
    """Activations with all that is known about their rows."""
    lengths = [len(window) for window in windows]
    return Rows(
        activations=activations,
        token_id=np.concatenate([window.ids for window in windows]),
        doc_id=np.concatenate([window.doc_id for window in windows]),
        window=np.repeat(np.array([window.number for window in windows], np.uint64), lengths),
        position=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        doc_position=np.concatenate([window.doc_position for window in windows]),
        flags=np.concatenate([window.flags for window in windows]),
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
