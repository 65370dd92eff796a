"""Rows, documents and hook points, shared by everything that produces, stores or reads activations.

Shapes: N rows, D = d_in. A row is one token, or one text for models that give a single vector per text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sae_granary.common.errors import GranaryError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    # float32, float16 or ml_dtypes.bfloat16
    FloatArray = npt.NDArray[Any]

FLAG_SPECIAL = 0x01  # special token: [CLS], [SEP], BOS, EOS, ...
FLAG_WINDOW_START = 0x02  # position 0 of its window
FLAG_CONTROL = 0x04  # beside FLAG_SPECIAL: a control token without a role, <|start_header_id|>, <|eot_id|>, ...
FLAG_ABSENT = 0x80  # no row here: the fill value behind the end of a short shard

Scalar = str | int | float | bool | None  # a value of a kept column

Side = Literal["output", "input"]
SIDES = ("output", "input")
MAX_D_IN = 1 << 24

# A hook point's name is a folder name: it starts with a letter or digit, so "." and ".." cannot be.
HOOK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class BlockSums:
    """Sums over a block of rows, in float64 and in the order of `cache.format.stats.block_sums`."""

    sum_D: npt.NDArray[np.float64]
    square_D: npt.NDArray[np.float64]  # sum of x^2; not finite if any value of the block is not
    square_N: npt.NDArray[np.float64]  # ||x||^2 of each row
    error_D: npt.NDArray[np.float64] | None = None  # sum of (stored - exact)^2, of dtypes whose error is measured


@dataclass(frozen=True)
class Rows:
    """N rows of whole windows in source order; every array has N as its first length."""

    activations: Mapping[str, FloatArray]  # hook point name -> (N, D)
    token_id: npt.NDArray[np.int32]  # -1 for unit "text"
    doc_id: npt.NDArray[np.int64]  # ordinal of the document in the source, skipped documents counted
    window: npt.NDArray[np.uint64]  # number of the window that the model saw, counted over the harvest
    position: npt.NDArray[np.int32]  # in the window, special tokens counted
    doc_position: npt.NDArray[np.int32]  # in the document's own tokens; -1 for special tokens added per window
    flags: npt.NDArray[np.uint8]  # FLAG_* bits
    # Of a device that summed some blocks of rows already: hook point name -> first row -> sums.
    sums: Mapping[str, Mapping[int, BlockSums]] = field(default_factory=dict)

    @property
    def n_rows(self) -> int:
        """N."""
        return len(self.token_id)

    def __getitem__(self, index: slice) -> Rows:
        """The rows of a slice, as views."""
        start, stop, _ = index.indices(self.n_rows)
        sums = {
            hook: {row - start: block for row, block in blocks.items() if start <= row < stop}
            for hook, blocks in self.sums.items()
        }
        return Rows(
            {name: array[index] for name, array in self.activations.items()},
            self.token_id[index],
            self.doc_id[index],
            self.window[index],
            self.position[index],
            self.doc_position[index],
            self.flags[index],
            sums,
        )


@dataclass(frozen=True)
class DocumentRow:
    """A document of the source: where it came from, its text, and the columns of its record that were kept."""

    doc_id: int
    source: str
    source_row: int
    text: str
    columns: Mapping[str, Scalar] = field(default_factory=dict)


class InvalidHookPointError(GranaryError, ValueError):
    """A hook point with an invalid name, side or width."""


@dataclass(frozen=True)
class HookPoint:
    """Where in the model activations were taken; enough to splice an SAE in again without the harvest code.

    Raises InvalidHookPointError.
    """

    name: str  # the folder name: "layer_6", "encoder.layer.6.attention.output", "encoder.layer.6.in"
    module: str  # module path relative to the base model
    side: Side
    tuple_index: int | None  # which element of a tuple output; None when the module returns a tensor
    d_in: int

    def __post_init__(self) -> None:
        if not HOOK_NAME.fullmatch(self.name):
            raise InvalidHookPointError(
                f"hook point name {self.name!r}: expected letters, digits, '.', '_', '-' (it names a folder)"
            )
        if self.side not in SIDES:
            raise InvalidHookPointError(
                f"hook point {self.name!r}: side is {self.side!r}, expected one of {', '.join(SIDES)}"
            )
        if not 1 <= self.d_in <= MAX_D_IN:
            raise InvalidHookPointError(f"hook point {self.name!r}: d_in is {self.d_in}, expected 1 to {MAX_D_IN}")
