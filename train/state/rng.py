"""torch's global generators, one state per run: several runs in one process draw as each would alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Rng:
    """States of the global generators that belong to one run; `with rng:` is where the run draws.

    They are those of the CPU and of the run's device: every step saves and restores them.
    """

    def __init__(self, device: str, tensors: Mapping[str, Tensor] | None = None) -> None:
        self.device = torch.device(device)
        self.tensors = self._capture() if tensors is None else dict(tensors)

    @classmethod
    def seeded(cls, seed: int, device: str) -> Rng:
        """The states behind `torch.manual_seed(seed)`, which this leaves in place."""
        torch.manual_seed(seed)
        return cls(device)

    def restore(self) -> None:
        """Set the generators. A state that another GPU had is taken if there is none of this one."""
        torch.set_rng_state(self.tensors["cpu"])
        states = {name: state for name, state in self.tensors.items() if name != "cpu"}
        if self.device.type == "cuda" and states:
            torch.cuda.set_rng_state(states.get(self._name, next(iter(states.values()))), self.device)

    def _capture(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        return states | {self._name: torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else states

    @property
    def _name(self) -> str:
        return f"cuda:{torch.cuda.current_device() if self.device.index is None else self.device.index}"

    def __enter__(self) -> Rng:
        self.restore()
        return self

    def __exit__(self, *_: object) -> None:
        self.tensors = self._capture()
