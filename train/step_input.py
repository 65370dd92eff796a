"""What a training step takes: rows of the cache, or contexts through a language model (`train.spliced_input`).

Shapes: N rows, D = d_in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from sae_granary.sae_core import SAE, Progress, SAEOutput

Inputs = Tensor | Mapping[str, Tensor]
Self = TypeVar("Self")


@dataclass(frozen=True, eq=False)
class Terms:
    """One forward pass in training: the SAE's output, what is minimised, and what is worth logging beside it."""

    out: SAEOutput
    losses: Mapping[str, Tensor]
    details: Mapping[str, float] = field(default_factory=dict)


class StepInput(Protocol):
    """A batch that knows how an SAE is trained on it."""

    @property
    def n_rows(self) -> int:
        """Rows that the SAE sees."""

    @property
    def device(self) -> torch.device:
        """Where they are."""

    def split(self: Self, n_parts: int) -> Iterator[Self]:
        """Micro-batches of about equal size."""

    def is_finite(self) -> bool:
        """Whether every value is. Asked before the forward pass, so that no counter or threshold sees a NaN."""

    def terms(self, sae: SAE, progress: Progress) -> Terms:
        """The forward pass and the losses."""


@dataclass(frozen=True, eq=False)
class RowInput:
    """Rows (N, D), or one such tensor per hook point: the SAE's own losses."""

    x: Inputs

    @property
    def tensors(self) -> list[Tensor]:
        """The rows of each hook point."""
        return [self.x] if isinstance(self.x, Tensor) else list(self.x.values())

    @property
    def n_rows(self) -> int:
        """N."""
        return len(self.tensors[0])

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.tensors[0].device

    def split(self, n_parts: int) -> Iterator[RowInput]:
        """Equal parts."""
        if n_parts == 1:
            yield self
        elif isinstance(self.x, Tensor):
            yield from map(RowInput, self.x.chunk(n_parts))
        else:
            parts = {hook: rows.chunk(n_parts) for hook, rows in self.x.items()}
            yield from (RowInput({hook: p[i] for hook, p in parts.items()}) for i in range(n_parts))

    def is_finite(self) -> bool:
        """Whether every value is."""
        return all(_is_finite(t) for t in self.tensors)

    def terms(self, sae: SAE, progress: Progress) -> Terms:
        """The variant's losses."""
        out = sae(self.x)
        return Terms(out, sae.losses(out, progress))


def _is_finite(values: Tensor) -> bool:
    extremes = torch.stack(torch.aminmax(values))  # NaN where one is; no mask as large as the values
    return bool(torch.isfinite(extremes).all())
