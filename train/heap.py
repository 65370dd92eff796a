"""Large temporaries of a training on a CPU: kept by the C library between steps instead of given back to the kernel."""

from __future__ import annotations

import ctypes
import sys

# mallopt's parameters, from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have malloc reuse large blocks for the rest of the process; whether the C library could (glibc only).

    A step allocates and frees its (batch, d_sae) pre-activations. Blocks of that size come from the kernel by default,
    zeroed page by page on first touch, which costs as much as half of the encoder product that fills them.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    # One arena: those of threads give their blocks back whatever the threshold.
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_ARENA_MAX, 1))
    applied = [mallopt(name, value) for name, value in settings]
    return all(applied)
