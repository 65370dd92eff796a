"""The scalar types of a cache's arrays: everything that depends on one is asked of its `Storage`.

A new dtype for activations is one more entry of `STORAGE`. Importing this file loads no numpy, since `--help` lists the
dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[Any]"


@dataclass(frozen=True)
class Storage:
    """How one scalar type is stored, always little-endian, and how stored values are checked."""

    name: str  # in the manifest; Zarr, numpy (with ml_dtypes) and torch use the same name
    code: str  # what numpy.dtype() takes
    exponent: int | None = None  # exponent bits, all set in NaN and Inf only; None for types without NaN
    fill: float | int = math.nan  # value of absent rows

    @cached_property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype."""
        import ml_dtypes  # noqa: F401  importing it teaches numpy its types
        import numpy as np

        return np.dtype(self.code)

    @cached_property
    def integers(self) -> np.dtype[Any]:
        """Signed integers of the same size: numpy copies them plainly, and torch wraps arrays of them."""
        import numpy as np

        return np.dtype(f"i{self.item_bytes}")

    @property
    def item_bytes(self) -> int:
        """Bytes of one scalar."""
        return self.numpy.itemsize

    @property
    def zarr_fill(self) -> str | int:
        """The fill value in Zarr's JSON."""
        return self.fill if isinstance(self.fill, int) else "NaN"

    def store(self, values: Array, out: Array) -> int | None:
        """Round `values` into `out`, an array of this type; flat index of the first NaN or Inf in it, or None.

        A finite value beyond the range of the type is stored as Inf, so it is found too.
        """
        import numpy as np

        with np.errstate(over="ignore", invalid="ignore"):
            out[...] = values
        return self.first_non_finite(out)

    def first_non_finite(self, values: Array) -> int | None:
        """Flat index of the first NaN or Inf in `values` of this type, or None. Two integer passes, no float ones."""
        if self.exponent is None:
            return None
        bits = values.view(self._exponent_bits.dtype)
        found = (bits & self._exponent_bits) == self._exponent_bits
        return int(found.argmax()) if found.any() else None

    @cached_property
    def _exponent_bits(self) -> np.unsignedinteger[Any]:
        import numpy as np

        bits: np.unsignedinteger[Any] = np.dtype(f"u{self.item_bytes}").type(self.exponent)
        return bits

    @cached_property
    def largest(self) -> float:
        """The largest finite value."""
        import ml_dtypes
        import numpy as np

        return float((np.iinfo if self.exponent is None else ml_dtypes.finfo)(self.numpy).max)


STORAGE = {
    storage.name: storage
    for storage in (
        Storage("float32", "<f4", 0x7F80_0000),
        Storage("float16", "<f2", 0x7C00),
        Storage("bfloat16", "bfloat16", 0x7F80),
    )
}
"""The dtypes of activations, by name."""


def wider_than(storage: Storage) -> Sequence[str]:
    """Names of the dtypes with a larger range, the nearest first."""
    wider = [other for other in STORAGE.values() if other.largest > storage.largest]
    return [other.name for other in sorted(wider, key=lambda other: other.largest)]


def register_bfloat16() -> None:
    """Teach zarr-python the data type "bfloat16", unless it brings its own. Needed only to read a cache with zarr.

    zarr's entry point for data types is inert before 3.4, so a caller registers before opening an array.
    """
    from zarr.core.dtype import data_type_registry

    if "bfloat16" in data_type_registry.contents:
        return
    from sae_granary.cache.format.zarr_bfloat16 import BFloat16

    data_type_registry.register("bfloat16", BFloat16)
