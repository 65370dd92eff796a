"""Choosing the device, and computing what a device does not support."""

from __future__ import annotations

import re
import socket
from typing import TYPE_CHECKING

from sae_granary.common.errors import ConfigError, one_line

if TYPE_CHECKING:
    import torch

NO_FLOAT64 = {"mps"}  # types of devices
_KNOWN = "expected auto, cpu, cuda, cuda:N or mps"


def choose_device(wanted: str) -> str:
    """Return a device of this machine; auto is the first CUDA device if there is one, else the CPU.

    Raises ConfigError for a device that is unknown or missing.
    """
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"(cpu|cuda|mps)(?::(\d+))?", wanted)
    if match is None:
        raise ConfigError(f"device {wanted!r} is unknown: {_KNOWN}")
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if match[1] == "cuda" and int(match[2] or 0) >= n_cuda:
        raise ConfigError(f"device {wanted!r}: PyTorch finds {n_cuda} CUDA devices on this machine; give cpu or auto")
    if match[1] == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device 'mps': PyTorch finds no Apple GPU on this machine; give cpu or auto")
    return wanted


def check_usable(device: str) -> None:
    """Raise ConfigError for a GPU that another job has for itself, or whose memory it has filled."""
    import torch

    if not device.startswith("cuda"):
        return
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        raise ConfigError(
            f"device {device!r} of {socket.gethostname()} cannot be used ({one_line(error)[:150]}): if another job "
            "uses it (see nvidia-smi), wait for its end, or choose another GPU with CUDA_VISIBLE_DEVICES"
        ) from None


def lacks_float64(device: torch.device) -> bool:
    """Whether a device does not support float64."""
    return device.type in NO_FLOAT64


def float64(x: torch.Tensor) -> torch.Tensor:
    """Convert a tensor to float64, on its device or, if that does not support it, on the CPU."""
    return (x.cpu() if lacks_float64(x.device) else x).double()
