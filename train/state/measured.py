"""What a measured step finds: losses, metrics and norms, read back from the device while the next step runs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sae_granary.sae_core.metrics import Evaluator
from sae_granary.train.state.readback import Numbers, Readback


class Measured:
    """Numbers of one step; asking for one waits until the device has computed it."""

    def __init__(self, losses: Numbers, details: Numbers, grad_norms: Numbers, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self._read = Readback(losses=losses, details=details, grad_norms=grad_norms, sums=evaluator.sums())

    @property
    def losses(self) -> Mapping[str, float]:
        """Mean over micro-batches, by name."""
        return self._read["losses"]

    @property
    def details(self) -> Mapping[str, float]:
        """What the variant reports: threshold, routing ..."""
        return self._read["details"]

    @property
    def grad_norms(self) -> Mapping[str, float]:
        """By parameter, before clipping."""
        return self._read["grad_norms"]

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """l0, fvu, ... of the batch."""
        return self._evaluator.of_sums(self._read["sums"])

    @property
    def fired(self) -> Tensor:
        """(F,) on how many of `n_rows` rows each latent fired, on the device of the rows."""
        return self._evaluator.fired

    @property
    def n_rows(self) -> int:
        """Rows that were measured."""
        return self._evaluator.n_rows
