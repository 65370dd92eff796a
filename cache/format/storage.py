"""The dtypes that arrays are stored in, and bfloat16 as a Zarr data type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Storage:
    """How one scalar type lies on disk: always little-endian."""

    name: str  # Zarr's name of the data type
    numpy: np.dtype[Any]
    exponent: np.unsignedinteger[Any] | None = None  # exponent bits, all set in NaN and Inf; None for integers

    @property
    def item_bytes(self) -> int:
        """Bytes of one scalar."""
        return self.numpy.itemsize

    def first_non_finite(self, values: Array) -> int | None:
        """Flat index of the first NaN or Inf in `values` of this type, or None. Two integer passes, no float ones."""
        if self.exponent is None:
            return None
        bits = values.view(self.exponent.dtype)
        found = (bits & self.exponent) == self.exponent
        return int(found.argmax()) if found.any() else None


STORAGE = {
    storage.name: storage
    for storage in (
        Storage("float32", np.dtype("<f4"), np.uint32(0x7F80_0000)),
        Storage("float16", np.dtype("<f2"), np.uint16(0x7C00)),
        Storage("bfloat16", np.dtype(ml_dtypes.bfloat16), np.uint16(0x7F80)),
        Storage("int32", np.dtype("<i4")),
        Storage("int64", np.dtype("<i8")),
        Storage("uint64", np.dtype("<u8")),
        Storage("uint8", np.dtype("u1")),
    )
}


def register_bfloat16() -> None:
    """Teach zarr-python the data type "bfloat16", unless it brings its own. Needed only to read a cache with zarr.

    zarr's entry point for data types is inert before 3.4, so a caller registers before opening an array.
    """
    from zarr.core.dtype import data_type_registry

    if "bfloat16" in data_type_registry.contents:
        return
    from sae_granary.cache.format.zarr_bfloat16 import BFloat16

    data_type_registry.register("bfloat16", BFloat16)
