"""Settings of a whole process that make it faster on a CPU: how memory is freed, and numbers below 1e-38.

The commands and the benchmarks make them. Importing or calling the library leaves a process as it is; from Python wrap
the work in them:

    with tuned_process("cpu"):
        train_sae(cache="cache/bert_l6", type="topk")

Flushed denormals change the last bits of a long training: a run resumes bit for bit where both halves have them (two
commands) or neither has (two calls).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from sae_granary.common.threads import waiting

DENORMAL = 1e-40
MAX_OPEN_FILES = 1 << 16  # asked for, where the system allows more

# Times that a thread looks again before it sleeps: no slower on a machine that is otherwise idle, and a tenth as long a
# step on one that is not (benchmarks/RESULTS.md).
SPIN_COUNT = "1000"

# mallopt's parameters, from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1


def allow_open_files() -> None:
    """Raise the limit of open files to what the system allows: one per mapped shard, one per SAE of a sweep."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS names a hard limit that it does not grant
        if soft != resource.RLIM_INFINITY:
            wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def most_maps() -> int:
    """How many files this process may keep mapped: each takes a descriptor, and a mapping of those the kernel allows.

    Half of either limit is left for everything else.
    """
    try:
        import resource

        n_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except ImportError:  # not on Windows
        return MAX_OPEN_FILES // 2
    if n_files == resource.RLIM_INFINITY:
        n_files = MAX_OPEN_FILES
    return max(min(n_files, _max_map_count()) // 2, 1)


@functools.cache
def _max_map_count() -> int:
    try:
        with open("/proc/sys/vm/max_map_count", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):  # not Linux
        return MAX_OPEN_FILES


class Mapped(Protocol):
    """An array over shards, some of which it has mapped."""

    def drop(self, i: int) -> None:
        """Forget the map of the i-th opened shard."""


_KEPT: deque[tuple[weakref.ref[Mapped], int]] = deque()  # array and opened shard of each map, the oldest first
_LOCK = threading.Lock()


def keep_map(array: Mapped, i: int) -> None:
    """Count a map among the kept ones; where there are too many, drop those of arrays that are gone and the oldest."""
    with _LOCK:
        _KEPT.append((weakref.ref(array), i))
        if len(_KEPT) <= (most := most_maps()):
            return
        living = [(owner, index) for owner, index in _KEPT if owner() is not None]
        n_dropped = max(len(living) - most + most // 16, 0)
        _KEPT.clear()
        _KEPT.extend(living[n_dropped:])
    for owner, index in living[:n_dropped]:
        if (old := owner()) is not None:
            old.drop(index)


def share_cores() -> None:
    """Have torch's threads sleep soon when they wait for each other; set before torch is loaded, else without effect.

    By default a thread of GNU's OpenMP that waits for another spins 300,000 times (about 7 ms on an AMD processor). On
    a machine that other processes use too, the one waited for may not be running: the spinning thread then takes the
    time that it needs. Environment variables of the user go first.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def open_files_left() -> int | None:
    """How many more files this process may open; None if the system does not report it."""
    try:
        import resource

        used = len(os.listdir("/proc/self/fd")) - 1  # the listing itself is one
    except (ImportError, OSError):
        return None
    return int(resource.getrlimit(resource.RLIMIT_NOFILE)[0]) - used


@contextmanager
def tuned_process(device: str) -> Iterator[None]:
    """Flush denormals to zero inside the block; on the CPU also keep freed memory, which lasts beyond the block."""
    keep_freed_memory(device)
    with flushed_denormals():
        yield


def keep_freed_memory(device: str = "cpu") -> bool:
    """Have malloc reuse large blocks for the rest of the process; whether it does (on a CPU, with glibc).

    A training step allocates and frees its (batch, d_sae) pre-activations, a forward pass those of its layers. Blocks
    of that size come from the kernel by default, zeroed page by page on first touch, which costs as much as half of the
    encoder product that fills them and a tenth of a forward pass.
    """
    if not sys.platform.startswith("linux") or not _is_cpu(device):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    # One arena: those of threads give their blocks back whatever the threshold.
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_ARENA_MAX, 1))
    applied = [mallopt(name, value) for name, value in settings]
    return all(applied)


def _is_cpu(device: str) -> bool:
    with waiting("loading PyTorch"):
        import torch

    return device.startswith("cpu") or (device == "auto" and not torch.cuda.is_available())


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Flush denormals to zero inside the block, where the processor can; afterwards this thread is as before.

    Arithmetic with them is a hundred times slower. Adam's mean gradient of a latent that no longer fires falls to such
    numbers in about 700 steps and stays there. Threads inherit the setting when they start, so this belongs before the
    first large operation of a process.
    """
    import torch

    before = flushes_denormals()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def flushes_denormals() -> bool:
    """Whether this thread flushes denormals to zero."""
    import torch

    return float(torch.tensor([DENORMAL]) * 0.5) == 0.0
