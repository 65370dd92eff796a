"""What the contestants share."""

import argparse
from collections.abc import Callable

from torch import Tensor

Step = Callable[[], object]
Maker = Callable[[Tensor, argparse.Namespace], Step]  # from a (B, D) batch and the command line

SHARES = (1 / 32, 2 / 32, 4 / 32, 8 / 32, 17 / 32)  # of the latents, in each group of a matryoshka
