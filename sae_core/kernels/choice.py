"""Which implementation the sparse products use: Triton kernels, or torch's own operations ("eager")."""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

from sae_granary.common.threads import say

VARIABLE = "GRANARY_KERNELS"
CHOICES = ("auto", "eager", "triton")

_forced: dict[str, str] = {}  # what `choose` was called with, under VARIABLE


def choose(kernels: str | None) -> None:
    """Use these kernels from now on: "auto", "eager" or "triton"; None reads the environment variable again.

    "auto" uses Triton for CUDA tensors where it is installed and works. "triton" uses it for all tensors; on a CPU that
    requires Triton's interpreter (TRITON_INTERPRET=1).
    """
    _forced.clear()
    if kernels is not None:
        _forced[VARIABLE] = _known(kernels)
    chosen.cache_clear()
    triton_works.cache_clear()


def triton_installed() -> bool:
    """Whether Triton can be imported, without importing it; a folder named triton does not count."""
    spec = importlib.util.find_spec("triton")
    return spec is not None and spec.origin is not None


@cache
def chosen() -> str:
    """The current choice, with "auto" resolved to "eager" without Triton. Resolved once, at first use."""
    kernels = _forced.get(VARIABLE) or _known(os.environ.get(VARIABLE) or "auto")
    if kernels != "auto" or triton_installed():
        return kernels
    if torch.cuda.is_available():
        say("Triton is not installed: torch's own operations are used, which are slower on a GPU (pip install triton)")
    return "eager"


def takes_triton(tensor: Tensor) -> bool:
    """Whether products of this tensor run as Triton kernels."""
    kernels = chosen()
    return kernels == "triton" or (kernels == "auto" and tensor.is_cuda and triton_works())


@cache
def triton_works() -> bool:
    """Whether Triton compiles and runs a kernel on the current GPU; a line says why not. Tried once."""
    try:
        _try_kernel()
    except Exception as error:  # of a compiler, a driver, a linker, ...
        text = " ".join(str(error).split()) or type(error).__name__
        say(f"Triton fails on this GPU ({text:.200}): torch's own operations are used, which are slower")
        return False
    return True


def _try_kernel() -> None:
    """Run a small sparse product as a Triton kernel. Raises whatever fails, ValueError for a wrong result."""
    from sae_granary.sae_core.kernels import triton_bag

    table = torch.ones(4, 16, device="cuda")
    indices, offsets = (torch.tensor(values, device="cuda") for values in ([0, 1, 3], [0, 2, 3]))
    found = triton_bag.bag_sum(indices, table, offsets, torch.ones(3, device="cuda"))
    if found[:, 0].tolist() != [2.0, 1.0]:
        raise ValueError("a kernel gives a wrong sum")


def _known(kernels: str) -> str:
    if kernels not in CHOICES:
        raise ValueError(f"{VARIABLE}={kernels!r}: expected one of {', '.join(CHOICES)}")
    return kernels
