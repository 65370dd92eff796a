"""Types of an SAE's inputs and outputs.

Shapes: N rows, D = d_in, F = d_sae.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from sae_granary.sae_core.codes import Codes
from sae_granary.sae_core.errors import OptionError
from sae_granary.sae_core.pre_acts import PreActs

NUMBERS = "fiuV"  # kinds of NumPy dtypes; ml_dtypes' bfloat16 is a V
T = TypeVar("T")
Rows = Mapping[str, Tensor]  # raw rows (N, D) by hook point, in the order of a batch; what every step works on


class Array(Protocol):
    """A tensor, or anything NumPy converts to one."""

    def __array__(self, dtype: Any = ..., /) -> Any:
        """Convert to a NumPy array."""


Inputs = Array | Mapping[str, Array]  # what a user may give: rows of the only hook point, or by hook point


@dataclass(frozen=True)
class Repeatable(Iterable[T], Generic[T]):
    """Calls `make` for each loop over it."""

    make: Callable[[], Iterator[T]]

    def __iter__(self) -> Iterator[T]:
        """Begin again."""
        return self.make()


class Reader(Protocol):
    """The parts of an SAE that describe its inputs."""

    @property
    def core(self) -> Any:
        """Holds b_dec, whose dtype and device rows get."""

    @property
    def normalizers(self) -> Sequence[Any]:
        """One per hook point, the last for all further ones; `mean` (D,) has the width."""

    @property
    def config(self) -> Any:
        """Has `n_hooks` where a type reads several hook points."""


def hook_widths(sae: Reader) -> list[int]:
    """The width D of the rows of each hook point that an SAE reads, in order."""
    widths = [len(normalizer.mean) for normalizer in sae.normalizers]
    return widths + widths[-1:] * (getattr(sae.config, "n_hooks", 1) - len(widths))


def as_rows(x: Inputs, like: Tensor | Reader) -> Rows:
    """Return rows (N, D) by hook point, with the dtype and the device of a tensor or an SAE.

    Takes tensors and arrays of any number type, one row (D,) and batches of sequences (..., D), whose rows follow each
    other. Raises OptionError for anything else, and for rows of another width than the SAE's.
    """
    widths = [] if isinstance(like, Tensor) else [len(normalizer.mean) for normalizer in like.normalizers]
    target: Tensor = like if isinstance(like, Tensor) else like.core.b_dec
    named = x if isinstance(x, Mapping) else {"rows": x}
    rows = {name: _as_tensor(name, values, target) for name, values in named.items()}
    for i, (name, values) in enumerate(rows.items()):
        if widths and values.shape[1] != (width := widths[min(i, len(widths) - 1)]):
            given = tuple(getattr(named[name], "shape", values.shape))
            raise OptionError(f"{name}: shape {given}, expected rows of width {width}, as (..., {width})")
    if len({len(values) for values in rows.values()}) > 1:
        found = ", ".join(f"{name} {len(values):,}" for name, values in rows.items())
        raise OptionError(f"hook points with different numbers of rows ({found}): expected the same rows of each")
    return rows


def _as_tensor(name: str, values: Any, like: Tensor) -> Tensor:
    """Rows (N, D). An array is copied: rows of a cache are read-only. NumPy converts the bfloat16 of ml_dtypes."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if not isinstance(values, Tensor):
        try:
            is_list = isinstance(values, list | tuple)
            array = torch.tensor(values, dtype=dtype).numpy() if is_list else values.__array__()
            known = array.dtype.kind in NUMBERS
            exact = array.astype(str(dtype).removeprefix("torch.")) if known else None
        except (AttributeError, TypeError, ValueError):  # texts, None, lists of unequal lengths
            exact = None
        if exact is None:
            raise OptionError(
                f"{name}: a {type(values).__name__}, expected activations: a tensor or an array of numbers (..., D); "
                "`encode_texts` encodes texts"
            )
        values = torch.tensor(exact, dtype=like.dtype, device=like.device)
    if not values.is_floating_point() or values.ndim == 0:
        raise OptionError(f"{name}: {values.dtype} of shape {tuple(values.shape)}, expected floating rows (..., D)")
    rows: Tensor = values if values.ndim == 2 else values.reshape(-1, values.shape[-1])
    return rows.to(like)


def _all_of_them(names: Sequence[str], n_layers: int | None) -> tuple[str, ...]:
    return tuple(names)


@dataclass(frozen=True)
class Reads:
    """What the loader must provide for each encoded row."""

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
    """What a variant encodes and what it reconstructs, both normalized."""

    input: Tensor  # (N, D) enters the encoder
    target: Tensor  # (N, D_out) what the decoder should return
    undo: Callable[[Tensor], Tensor]  # normalized reconstruction -> the space of `reference`
    reference: Tensor  # (N, D_out) what x_hat is compared with in the metrics (raw rows)
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # what the variant's own losses need


@dataclass(frozen=True, eq=False)
class Activation:
    """Result of a variant's `activate`."""

    codes: Codes
    pre_acts: PreActs  # (N, F), without gradients
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # what the variant's own losses need


@dataclass(frozen=True, eq=False)
class SAEOutput:
    """One forward pass."""

    x: Tensor  # (N, D_out) what x_hat should equal
    codes: Codes
    recon: Tensor  # (N, D_out) reconstruction in the normalized space
    source: Source
    pre_acts: PreActs  # (N, F), without gradients
    extras: Mapping[str, Tensor]  # of the source, of the activation and of the reconstruction

    @cached_property
    def x_hat(self) -> Tensor:
        """(N, D_out) reconstruction in the space of x; no loss needs it, so it is computed when it is asked for."""
        return self.source.undo(self.recon)
