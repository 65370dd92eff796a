"""What a harvest hands to the writer: rows, documents, hook points, and the promise of a whole cache.

Shapes: N rows, D = d_in. One row is one token (`unit="token"`) or one text (`unit="text"`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sae_granary.cache.errors import SpecError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    # float32, float16 or ml_dtypes.bfloat16
    FloatArray = npt.NDArray[Any]

FLAG_SPECIAL = 0x01  # special token: [CLS], [SEP], BOS, EOS, ...
FLAG_WINDOW_START = 0x02  # position 0 of its window
FLAG_ABSENT = 0x80  # no row here: the fill value behind the end of a short shard

Unit = Literal["token", "text"]
Dtype = Literal["float32", "float16", "bfloat16"]
Side = Literal["output", "input"]

UNITS = ("token", "text")
DTYPES = ("float32", "float16", "bfloat16")
SIDES = ("output", "input")

# A hook point's name is a folder name: it starts with a letter or digit, so "." and ".." cannot be.
HOOK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")

DEFAULT_INNER_CHUNK_BYTES = 1 << 20
MAX_ROWS_PER_SHARD = 1 << 32
MAX_D_IN = 1 << 24


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

    @property
    def n_rows(self) -> int:
        """N."""
        return len(self.token_id)

    def __getitem__(self, index: slice) -> Rows:
        """The rows of a slice, as views."""
        return Rows(
            {name: array[index] for name, array in self.activations.items()},
            self.token_id[index],
            self.doc_id[index],
            self.window[index],
            self.position[index],
            self.doc_position[index],
            self.flags[index],
        )


@dataclass(frozen=True)
class DocumentRow:
    """A document of the source: where it came from and its text."""

    doc_id: int
    source: str
    source_row: int
    text: str


@dataclass(frozen=True)
class HookPoint:
    """Where in the model activations were taken; enough to splice an SAE in again without the harvest code."""

    name: str  # the folder name: "layer_6", "encoder.layer.6.attention.output", "encoder.layer.6.in"
    module: str  # module path relative to the base model
    side: Side
    tuple_index: int | None  # which element of a tuple output; None when the module returns a tensor
    d_in: int

    def __post_init__(self) -> None:
        if not HOOK_NAME.fullmatch(self.name):
            raise SpecError(
                f"hook point name {self.name!r}: expected letters, digits, '.', '_', '-' (it names a folder)"
            )
        if self.side not in SIDES:
            raise SpecError(f"hook point {self.name!r}: side is {self.side!r}, expected one of {', '.join(SIDES)}")
        if not 1 <= self.d_in <= MAX_D_IN:
            raise SpecError(f"hook point {self.name!r}: d_in is {self.d_in}, expected 1 to {MAX_D_IN}")


@dataclass(frozen=True)
class Cursor:
    """Where a resumed harvest starts again: the start of a sort buffer, and how many of its rows are committed."""

    source: Mapping[str, int]  # the harvest's own state at the start of the buffer; opaque here
    rows_into_buffer: int


@dataclass(frozen=True)
class CacheSpec:
    """What a harvest promises before it starts."""

    unit: Unit
    hook_points: tuple[HookPoint, ...]
    dtype: Dtype
    rows_per_shard: int
    provenance: Mapping[str, Any]  # JSON: model, revision, tokenizer, dataset, versions, ...
    fingerprint: Mapping[str, Any]  # flat JSON: what determines the contents; compared field by field on resume
    vocabulary: Sequence[str] | None = field(default=None, repr=False)  # token id -> string, for display
    inner_chunk_bytes: int = DEFAULT_INNER_CHUNK_BYTES  # about; inner chunks hold whole rows and divide the shard

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise SpecError(f"unit is {self.unit!r}, expected one of {', '.join(UNITS)}")
        if self.dtype not in DTYPES:
            raise SpecError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if not self.hook_points:
            raise SpecError("a cache needs at least one hook point")
        names = [hook.name.casefold() for hook in self.hook_points]  # folders may be case-insensitive
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise SpecError(f"hook point names must differ (case ignored): {', '.join(double)} occurs twice")
        if not 1 <= self.rows_per_shard <= MAX_ROWS_PER_SHARD:
            raise SpecError(f"rows_per_shard is {self.rows_per_shard}, expected 1 to {MAX_ROWS_PER_SHARD}")
        if self.inner_chunk_bytes < 1:
            raise SpecError(f"inner_chunk_bytes is {self.inner_chunk_bytes}, expected at least 1")
