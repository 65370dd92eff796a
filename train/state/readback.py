"""Numbers on their way from a device: the host does not wait for them before it reads them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from sae_granary.common.device import float64

Numbers = Mapping[str, Tensor | float]  # scalars by name, on any device


class Readback:
    """Groups of numbers by name. A device copies its numbers, all together, when it has computed them."""

    def __init__(self, **groups: Numbers) -> None:
        values = [value for group in groups.values() for value in group.values()]
        waiting = [value.detach() for value in values if isinstance(value, Tensor) and _is_away(value)]
        self._host, self._arrived = torch.empty(0), None
        if waiting:
            found = torch.stack([float64(value).reshape(()) for value in waiting])
            self._host = torch.empty(found.shape, dtype=found.dtype, pin_memory=found.is_cuda)
            self._host.copy_(found, non_blocking=True)
            if found.is_cuda:
                self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._arrived.record()
        # What is on the CPU may be overwritten before it is asked for.
        self._here = {
            name: {key: None if _is_away(value) else float(value) for key, value in group.items()}
            for name, group in groups.items()
        }

    def __getitem__(self, group: str) -> dict[str, float]:
        """The numbers of a group; waits until they are there."""
        return self._numbers[group]

    @cached_property
    def _numbers(self) -> dict[str, dict[str, float]]:
        if self._arrived is not None:
            self._arrived.synchronize()
        found = iter(self._host.tolist())
        return {
            name: {key: next(found) if value is None else value for key, value in group.items()}
            for name, group in self._here.items()
        }


def _is_away(value: Tensor | float) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"
