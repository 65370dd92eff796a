"""What the contestants share."""

import argparse
from collections.abc import Callable

from torch import Tensor

from benchmarks.apart import Turn

Trainer = Callable[[Tensor, argparse.Namespace, Turn], object]  # trains forever on a (B, D) batch, step by step

SHARES = (1 / 32, 2 / 32, 4 / 32, 8 / 32, 17 / 32)  # of the latents, in each group of a matryoshka


def repeat(step: Callable[[], object], turn: Turn) -> None:
    """Take a step at every turn."""
    while True:
        turn()
        step()
