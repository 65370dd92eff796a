"""bfloat16 as a data type of zarr-python 3.1; imported by `cache.format.storage.register_bfloat16` only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard

import ml_dtypes
import numpy as np
from zarr.core.dtype.npy.float import BaseFloat

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class BFloat16(BaseFloat[Any, Any]):  # BaseFloat brings HasEndianness and HasItemSize: tensorstore needs "endian"
    """The registered Zarr extension data type "bfloat16", with ml_dtypes' scalar in numpy."""

    dtype_cls = type(_BFLOAT16)
    _zarr_v3_name = "bfloat16"
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()  # format 2 has no such type

    @classmethod
    def _check_native_dtype(cls, dtype: np.dtype[Any]) -> TypeGuard[np.dtype[Any]]:
        return bool(dtype == _BFLOAT16)

    def to_native_dtype(self) -> Any:
        """The numpy dtype; ml_dtypes has it in the machine's byte order only."""
        return _BFLOAT16

    @property
    def item_size(self) -> int:
        """Bytes of one scalar."""
        return 2
