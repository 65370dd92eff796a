"""Numbers below 1e-38, at which a processor is a hundred times slower."""

from __future__ import annotations

import torch


def flush_denormals() -> bool:
    """Have the processor take them as 0 from now on; whether it can.

    Adam's mean gradient of a latent that no longer fires falls to such numbers in about 700 steps and stays there. A
    thread that already works keeps its setting, so this stands before the first large operation of a process.
    """
    can: bool = torch.set_flush_denormal(True)
    return can
