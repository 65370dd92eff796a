"""An exponential moving average of an SAE's parameters, which may replace them in the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from sae_granary.sae_core import SAE


class Ema:
    """average <- d * average + (1 - d) * parameter after every step, d = min(decay, (1 + n) / (10 + n)) in step n.

    The growing decay forgets the random start (as in TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, sae: SAE, decay: float) -> None:
        self.decay, self.n_updates = decay, 0
        self.tensors = {name: p.detach().clone() for name, p in sae.named_parameters()}

    @torch.no_grad()
    def update(self, sae: SAE) -> None:
        """Update the average after a step."""
        self.n_updates += 1
        decay = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates))
        parameters = [p.detach() for p in sae.parameters()]
        torch._foreach_lerp_(list(self.tensors.values()), parameters, 1 - decay)

    @torch.no_grad()
    def copy_to(self, sae: SAE) -> None:
        """Copy the averaged weights into an SAE, within the constraints of `after_step` (unit decoder rows ...)."""
        _set(sae, self.tensors)
        sae.after_step()

    @torch.no_grad()
    def restore(self, n_updates: int, tensors: Mapping[str, Tensor]) -> None:
        """Restore from a checkpoint."""
        self.n_updates = n_updates
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])


@contextmanager
def averaged(sae: SAE, ema: Ema | None) -> Iterator[None]:
    """Context manager: inside, the SAE has the averaged weights; afterwards its own, bit for bit."""
    if ema is None:
        yield
        return
    with torch.no_grad():
        own = {name: p.detach().clone() for name, p in sae.named_parameters()}
        try:
            ema.copy_to(sae)
            yield
        finally:
            _set(sae, own)


def _set(sae: SAE, tensors: Mapping[str, Tensor]) -> None:
    for name, p in sae.named_parameters():
        p.data.copy_(tensors[name])
