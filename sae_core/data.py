"""What enters and leaves an SAE, one type each.

Shapes: N rows, D = d_in, F = d_sae.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sae_granary.sae_core.codes import Codes
from sae_granary.sae_core.errors import OptionError
from sae_granary.sae_core.pre_acts import PreActs

Rows = Mapping[str, Tensor]  # raw rows (N, D) by hook point, in the order of a batch; what every step works on


class Array(Protocol):
    """A tensor, or what becomes one: a NumPy array."""

    def __array__(self, dtype: Any = ..., /) -> Any:
        """Convert to a NumPy array."""


Inputs = Array | Mapping[str, Array]  # what a user may give: rows of the only hook point, or by hook point


def as_rows(x: Inputs, like: Tensor) -> Rows:
    """Return rows by hook point; arrays get the dtype and the device of `like`, tensors stay as they are."""
    named = x if isinstance(x, Mapping) else {"rows": x}
    return {name: rows if isinstance(rows, Tensor) else _as_tensor(rows, like) for name, rows in named.items()}


def _as_tensor(rows: Array, like: Tensor) -> Tensor:
    """A copy: rows of a cache are read-only. torch cannot wrap the bfloat16 of ml_dtypes, NumPy converts it."""
    exact = rows.__array__("float64" if like.dtype == torch.float64 else "float32")
    return torch.tensor(exact, dtype=like.dtype, device=like.device)


def _all_of_them(names: Sequence[str], n_layers: int | None) -> tuple[str, ...]:
    return tuple(names)


@dataclass(frozen=True)
class Reads:
    """What the loader must deliver for each row that a variant encodes."""

    several: bool = False  # hook points, at least two of them; False: exactly one
    previous: bool = False  # the row before each row in its context, as a further entry of the batch
    # Which hook points of a cache are taken when none are named, from their names and the number of the model's layers.
    default_hooks: Callable[[Sequence[str], int | None], tuple[str, ...]] = _all_of_them

    @property
    def one_row(self) -> bool:
        """Whether a row of one hook point is enough to train on."""
        return not self.several and not self.previous

    def take(self, rows: Rows, n_hooks: int) -> list[Tensor]:
        """Return the rows of each of n hook points, without those before them.

        Raises OptionError if a batch holds another number of hook points.
        """
        found = list(rows.values())[: n_hooks if self.previous else None]
        if len(found) != n_hooks:
            wanted = "one hook point" if n_hooks == 1 else f"{n_hooks} hook points"
            raise OptionError(f"this type reads {wanted}, the batch holds {len(rows)}: {', '.join(rows)}")
        return found


@dataclass(frozen=True, eq=False)
class Source:
    """What a variant encodes and what it must reconstruct, both normalized."""

    input: Tensor  # (N, D) enters the encoder
    target: Tensor  # (N, D_out) what the decoder should return
    undo: Callable[[Tensor], Tensor]  # normalized reconstruction -> the space of `reference`
    reference: Tensor  # (N, D_out) what x_hat is compared with in the metrics (raw rows)
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # what the variant's own losses need


@dataclass(frozen=True, eq=False)
class Activation:
    """What a variant's `activate` returns."""

    codes: Codes
    pre_acts: PreActs  # (N, F), without gradients
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # what the variant's own losses need


@dataclass(frozen=True, eq=False)
class SAEOutput:
    """One forward pass."""

    x_hat: Tensor  # (N, D_out) reconstruction in the space of x
    x: Tensor  # (N, D_out) what x_hat should equal
    codes: Codes
    recon: Tensor  # (N, D_out) reconstruction in the normalized space
    source: Source
    pre_acts: PreActs  # (N, F), without gradients
    extras: Mapping[str, Tensor]  # of the source, of the activation and of the reconstruction
