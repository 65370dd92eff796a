"""Which implementation the sparse products use: Triton kernels, or torch's own operations ("eager")."""

import importlib.util
import os
from functools import cache

from torch import Tensor

VARIABLE = "GRANARY_KERNELS"
CHOICES = ("auto", "eager", "triton")

_forced: dict[str, str] = {}  # what `choose` was called with, under VARIABLE


def choose(kernels: str | None) -> None:
    """Use these kernels from now on: "auto", "eager" or "triton"; None reads the environment variable again.

    "auto" uses Triton for CUDA tensors where it is installed. "triton" uses it for all tensors; on a CPU that requires
    Triton's interpreter (TRITON_INTERPRET=1).
    """
    _forced.clear()
    if kernels is not None:
        _forced[VARIABLE] = _known(kernels)
    chosen.cache_clear()


def triton_installed() -> bool:
    """Whether Triton can be imported, without importing it; a folder named triton does not count."""
    spec = importlib.util.find_spec("triton")
    return spec is not None and spec.origin is not None


@cache
def chosen() -> str:
    """The current choice, with "auto" resolved to "eager" without Triton. Resolved once, at first use."""
    kernels = _forced.get(VARIABLE) or _known(os.environ.get(VARIABLE) or "auto")
    return "eager" if kernels == "auto" and not triton_installed() else kernels


def takes_triton(tensor: Tensor) -> bool:
    """Whether products of this tensor run as Triton kernels."""
    kernels = chosen()
    return kernels == "triton" or (kernels == "auto" and tensor.is_cuda)


def _known(kernels: str) -> str:
    if kernels not in CHOICES:
        raise ValueError(f"{VARIABLE}={kernels!r}: expected one of {', '.join(CHOICES)}")
    return kernels
