"""Keyed hashes of integers, independent of numpy's version: arithmetic modulo 2**64.

They decide which documents are held out, the order of rows and which tokens are masked, so resuming a run depends on
them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_MASK = 0xFFFF_FFFF_FFFF_FFFF
_GOLDEN = 0x9E37_79B9_7F4A_7C15  # odd, so that i -> key + i * _GOLDEN is injective
_M1 = 0xBF58_476D_1CE4_E5B9
_M2 = 0x94D0_49BB_1331_11EB

U64 = NDArray[np.uint64]


def mix64(x: U64) -> U64:
    """Finalizer of splitmix64: a bijection of 64-bit integers in which every input bit moves every output bit."""
    out = x >> np.uint64(30)
    out ^= x
    out *= np.uint64(_M1)
    out ^= out >> np.uint64(27)
    out *= np.uint64(_M2)
    out ^= out >> np.uint64(31)
    return out


def derive_key(*parts: int) -> int:
    """One 64-bit key from any integers, each reduced modulo 2**64; their order matters."""
    key = 0
    for part in parts:
        key = _mix_int((key * _M1 + _GOLDEN + (part & _MASK)) & _MASK)
    return key


def hash64(values: NDArray[Any], key: int) -> U64:
    """Keyed 64-bit hash of integers; distinct values never collide."""
    with np.errstate(over="ignore"):
        spread = values.astype(np.uint64)
        spread *= np.uint64(_GOLDEN)
        spread += np.uint64(key)
        return mix64(spread)


def _mix_int(x: int) -> int:
    """`mix64` of one Python integer."""
    x = ((x ^ (x >> 30)) * _M1) & _MASK
    x = ((x ^ (x >> 27)) * _M2) & _MASK
    return x ^ (x >> 31)
