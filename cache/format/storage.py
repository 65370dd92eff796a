"""The scalar types of a cache's arrays; everything that depends on the type is a method of `Storage`.

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
    """How a scalar type is stored, always little-endian, and how stored values are checked."""

    name: str  # in the manifest; Zarr, numpy (with ml_dtypes) and torch use the same name
    code: str  # what numpy.dtype() takes
    fill: float | int = math.nan  # value of absent rows
    scale: Storage | None = None  # of the one scale of each row; None: values are stored as they are
    version: int = 1  # of the format that has it

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
    def decoded(self) -> Storage:
        """The type of the values that readers give."""
        return self if self.scale is None else STORAGE["float32"]

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of so many values, with its scale."""
        return self.item_bytes * width + (0 if self.scale is None else self.scale.item_bytes)

    def store(self, values: Array, out: Array) -> int | None:
        """Round `values` into `out`, an array of this type; flat index of the first NaN or Inf in it, or None.

        A finite value beyond the range of the type is stored as Inf, so it is found too.
        """
        self.cast(values, out)
        return self.first_non_finite(out)

    def cast(self, values: Array, out: Array) -> None:
        """Round `values` into `out`, an array of this type; unlike `store`, nothing is checked."""
        import numpy as np

        with np.errstate(over="ignore", invalid="ignore"):
            out[...] = values

    def first_non_finite(self, values: Array) -> int | None:
        """Flat index of the first NaN or Inf in `values` of this type, or None."""
        import numpy as np

        finite = np.isfinite(values)
        return None if finite.all() else int(finite.argmin())

    def misfit(self, row: Array) -> int:
        """Index of the value for which a row of any float type cannot be stored: NaN, Inf, or too large."""
        import numpy as np

        if self.scale is None:
            return self.store(row, np.empty(len(row), self.numpy)) or 0
        magnitude = np.abs(row.astype(np.float64))
        return int(np.where(np.isfinite(magnitude), magnitude, np.inf).argmax())

    @cached_property
    def largest(self) -> float:
        """The largest finite value; of a dtype with scales that of a scale."""
        import ml_dtypes
        import numpy as np

        if self.scale is not None:
            return self.scale.largest
        return float((np.iinfo if isinstance(self.fill, int) else ml_dtypes.finfo)(self.numpy).max)


_FLOAT16 = Storage("float16", "<f2")
STORAGE = {
    storage.name: storage
    for storage in (
        Storage("float32", "<f4"),
        _FLOAT16,
        Storage("bfloat16", "bfloat16"),
        Storage("int8", "i1", fill=0, scale=_FLOAT16, version=2),  # see `cache.format.affine`
    )
}
"""The dtypes of activations, by name."""


def float_dtypes() -> list[str]:
    """Names of the dtypes in which rows are handed to a writer."""
    return [storage.name for storage in STORAGE.values() if storage.scale is None]


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
