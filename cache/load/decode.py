"""Rows as they are stored -> rows as they are read, on any device. Most dtypes are read as they are stored.

Where a dtype has a scale per row (`cache.format.affine`), the scales travel beside the codes under a separate name,
through pinned memory and pools, and rows are decoded when a batch was taken.

Shapes: B rows of a batch, D = d_in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_granary.cache.format.affine import BEND
from sae_granary.cache.format.storage import Storage

if TYPE_CHECKING:
    from sae_granary.cache.format.layout import CacheLayout
    from sae_granary.cache.read.arrays import HookRows, RowArray

SCALE = "@scale"  # after a name: the scales of its rows
_BLOCK = 1 << 18  # values that are decoded at once on a CPU, in a core's cache: 1.1 ms instead of 2.5 for 4096 x 384

Stored = Mapping[str, Tensor]  # by name; scales (B, 1) under a name that ends in SCALE


class Decoder:
    """Gives the rows of one name from what was taken of it."""

    def __init__(self, rows: HookRows, name: str) -> None:
        self._affine, self._d_in, self._name = rows.affine, rows.d_in, name
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def memory(self, n_rows: int, device: torch.device) -> Tensor | None:
        """For decoded rows; taken in the consumer's thread, as that of the rows themselves (`PoolRows.take`)."""
        if self._affine is None:
            return None
        return torch.empty(n_rows, self._d_in, dtype=torch.float32, device=device)

    def __call__(self, taken: Stored, out: Tensor | None) -> Tensor:
        """The rows (B, D), in `out` where they are decoded."""
        codes = taken[self._name]
        if out is None:
            return codes
        scale = taken[self._name + SCALE]
        return decode(codes, scale, *self._vectors(codes.device), out)

    def _vectors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on_device:
            assert self._affine is not None
            vectors = (self._affine.step_D, self._affine.offset_D)
            step, offset = (torch.from_numpy(np.array(vector)).to(device) for vector in vectors)
            self._on_device[device] = (step, offset)
        return self._on_device[device]


def rounding(layout: CacheLayout, hook: str) -> Callable[[Tensor], Tensor]:
    """Rounds rows (B, D) of any float type as a cache stores them; float32 comes out, on the same device."""
    storage = layout.activations[hook].storage
    if layout.affines is None:
        return lambda x_BD: x_BD.to(torch_dtype(storage)).float()
    affine = layout.affines[hook]
    return lambda x_BD: torch.from_numpy(affine.rounded(x_BD.float().cpu().numpy())).to(x_BD.device)


def torch_dtype(storage: Storage) -> torch.dtype:
    """The type that torch has for a storage type."""
    dtype: torch.dtype = getattr(torch, storage.name)
    return dtype


def decode(codes_BD: Tensor, scale_B1: Tensor, step_D: Tensor, offset_D: Tensor, out_BD: Tensor) -> Tensor:
    """q (|q| + 32) scale step + offset into `out`, bit by bit as numpy gives it: each product is exact."""
    n_rows = len(codes_BD)
    if codes_BD.device.type == "cpu":
        n_rows = min(n_rows, max(_BLOCK // max(codes_BD.shape[1], 1), 1))
    scale_B1 = scale_B1.float()
    q_ND, product_ND = (torch.empty_like(codes_BD[:n_rows], dtype=torch.int16) for _ in range(2))
    for start in range(0, len(codes_BD), max(n_rows, 1)):
        x_ND = out_BD[start : start + n_rows]
        q_ND, product_ND = q_ND[: len(x_ND)], product_ND[: len(x_ND)]  # the last block is smaller
        q_ND.copy_(codes_BD[start : start + n_rows])
        torch.abs(q_ND, out=product_ND).add_(BEND).mul_(q_ND)
        x_ND.copy_(product_ND).mul_(scale_B1[start : start + n_rows])
        torch.addcmul(offset_D, x_ND, step_D, out=x_ND)
    return out_BD


def stored_arrays(rows: HookRows, name: str) -> dict[str, RowArray]:
    """What is stored of a hook point, by name."""
    return {name: rows.stored} if rows.scales is None else {name: rows.stored, name + SCALE: rows.scales}


def stored_names(names: Sequence[str], storage: Storage) -> dict[str, Storage]:
    """The names under which rows of these are stored, with the type of each."""
    scales = {} if storage.scale is None else {name + SCALE: storage.scale for name in names}
    return dict.fromkeys(names, storage) | scales


def as_integers(shard: NDArray[Any], storage: Storage) -> NDArray[Any]:
    """A shard (n_rows, D or 1) of integers of the same size."""
    integers: NDArray[Any] = np.asarray(shard).view(storage.integers)
    return integers if integers.ndim > 1 else integers[:, None]
