"""What a training step takes: rows of the cache, or contexts through a language model (`train.spliced_input`).

Shapes: N rows, D = d_in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from sae_granary.sae_core import SAE, Progress, Rows, SAEOutput

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
    """Rows (N, D) of each hook point: the SAE's own losses."""

    rows: Rows

    @property
    def n_rows(self) -> int:
        """N."""
        return len(next(iter(self.rows.values())))

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return next(iter(self.rows.values())).device

    def split(self, n_parts: int) -> Iterator[RowInput]:
        """Equal parts."""
        chunks = zip(*(rows.chunk(n_parts) for rows in self.rows.values()), strict=True)
        yield from (RowInput(dict(zip(self.rows, parts, strict=True))) for parts in chunks)

    def is_finite(self) -> bool:
        """Whether every value is."""
        return all(_is_finite(t) for t in self.rows.values())

    def terms(self, sae: SAE, progress: Progress) -> Terms:
        """The variant's losses."""
        out = sae(self.rows)
        return Terms(out, sae.losses(out, progress))


def _is_finite(values: Tensor) -> bool:
    extremes = torch.stack(torch.aminmax(values))  # NaN where one is; no mask as large as the values
    return bool(torch.isfinite(extremes).all())
