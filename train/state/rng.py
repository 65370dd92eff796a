"""torch's global generators, one state per run: several runs in one process draw as each would alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Rng:
    """States of the global generators that belong to one run; `with rng:` is where the run draws."""

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        self.tensors = capture() if tensors is None else dict(tensors)

    @classmethod
    def seeded(cls, seed: int) -> Rng:
        """The states behind `torch.manual_seed(seed)`, which this leaves in place."""
        torch.manual_seed(seed)
        return cls()

    def __enter__(self) -> Rng:
        restore(self.tensors)
        return self

    def __exit__(self, *_: object) -> None:
        self.tensors = capture()


def capture() -> dict[str, Tensor]:
    """Capture the states of torch's global generators."""
    out = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        out |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return out


def restore(tensors: Mapping[str, Tensor]) -> None:
    """Restore torch's global generators; states of devices that are missing now are ignored."""
    torch.set_rng_state(tensors["cpu"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda:{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda:{i}"], i)
