"""Inputs of a training step: rows of the cache, or contexts through a language model (`train.spliced_input`).

Shapes: N rows, D = d_in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from sae_granary.sae_core import SAE, Progress, Rows, SAEOutput
from sae_granary.sae_core.kernels.deferred import FLOAT32_MAX, Bounded

Self = TypeVar("Self")


@dataclass(frozen=True, eq=False)
class Terms:
    """One forward pass in training: the SAE's output, the losses to minimize, and values to log."""

    out: SAEOutput
    losses: Mapping[str, Tensor]
    details: Mapping[str, float] = field(default_factory=dict)


class StepInput(Protocol):
    """A batch together with how an SAE is trained on it."""

    @property
    def n_rows(self) -> int:
        """Number of rows that the SAE reads."""

    @property
    def n_total(self) -> int:
        """Number of rows of the batch that this is, or is a rank's part of."""

    @property
    def device(self) -> torch.device:
        """Device of the rows."""

    def split(self: Self, n_parts: int) -> Iterator[Self]:
        """Micro-batches of about equal size."""

    def bounded(self) -> list[Bounded]:
        """Scalars that are within their limits if all values are usable."""

    def terms(self, sae: SAE, progress: Progress) -> Terms:
        """The forward pass and the losses."""


@dataclass(frozen=True, eq=False)
class RowInput:
    """Rows (N, D) of each hook point: the SAE's own losses."""

    rows: Rows
    limits: Mapping[str, float] = field(default_factory=dict)  # by name of rows: no harvested value is larger
    sizes: Sequence[int] | None = None  # of the micro-batches of a rank's part; None: equal ones
    n_shared: int = 0  # number of rows of the batch that ranks share

    @property
    def n_rows(self) -> int:
        """N."""
        return len(next(iter(self.rows.values())))

    @property
    def n_total(self) -> int:
        """N, or that of the batch that ranks share."""
        return self.n_rows if self.sizes is None else self.n_shared

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return next(iter(self.rows.values())).device

    def split(self, n_parts: int) -> Iterator[RowInput]:
        """Split into equal parts."""
        if n_parts == 1 and self.sizes is None:
            yield self
            return
        sizes = self.sizes
        chunks = zip(
            *(rows.chunk(n_parts) if sizes is None else torch.split(rows, list(sizes)) for rows in self.rows.values()),
            strict=True,
        )
        yield from (RowInput(dict(zip(self.rows, parts, strict=True)), self.limits) for parts in chunks)

    def bounded(self) -> list[Bounded]:
        """The extremes of each hook point's rows, NaN where one is, and the largest harvested value."""
        limits = {name: self.limits.get(name, FLOAT32_MAX) for name in self.rows}
        return [(extreme, limits[name]) for name, t in self.rows.items() for extreme in torch.aminmax(t)]

    def terms(self, sae: SAE, progress: Progress) -> Terms:
        """The variant's losses."""
        out = sae(self.rows)
        return Terms(out, sae.losses(out, progress))
