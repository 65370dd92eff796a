"""Large temporaries of models on a CPU: kept by the C library between batches instead of given back to the kernel."""

from __future__ import annotations

import ctypes
import sys

# mallopt's parameters, from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have malloc reuse large blocks for the rest of the process; whether the C library could (glibc only).

    A training step allocates and frees its (batch, d_sae) pre-activations, a forward pass those of its layers. Blocks
    of that size come from the kernel by default, zeroed page by page on first touch, which costs as much as half of the
    encoder product that fills them and a tenth of a forward pass.
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
