"""What a harvest promises about a whole cache before it starts, and where it is continued.

One row is one token (`unit="token"`) or one text (`unit="text"`); rows themselves are `sae_granary.common.rows.Rows`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sae_granary.cache.errors import SpecError
from sae_granary.cache.format.storage import STORAGE
from sae_granary.common.rows import HookPoint

Unit = Literal["token", "text"]

UNITS = ("token", "text")

DEFAULT_INNER_CHUNK_BYTES = 1 << 20
MAX_ROWS_PER_SHARD = 1 << 32


@dataclass(frozen=True)
class Cursor:
    """Where a resumed harvest continues: the start of a sort buffer, and how many of its rows are committed."""

    source: Mapping[str, int]  # the harvest's own state at the start of the buffer; opaque here
    rows_into_buffer: int


@dataclass(frozen=True)
class CacheSpec:
    """What a harvest promises before it starts."""

    unit: Unit
    hook_points: tuple[HookPoint, ...]
    dtype: str  # of STORAGE
    rows_per_shard: int
    provenance: Mapping[str, Any]  # JSON: model, revision, tokenizer, dataset, versions, ...
    fingerprint: Mapping[str, Any]  # flat JSON: what determines the contents; compared field by field on resume
    vocabulary: Sequence[str] | None = field(default=None, repr=False)  # token id -> string, for display
    inner_chunk_bytes: int = DEFAULT_INNER_CHUNK_BYTES  # about; inner chunks hold whole rows and divide the shard
    kept_columns: tuple[str, ...] = ()  # columns of the source's records that are stored with the documents
    block_docs: int | None = None  # documents of a block, where several processes harvest a block each

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise SpecError(f"unit is {self.unit!r}, expected one of {', '.join(UNITS)}")
        if self.dtype not in STORAGE:
            raise SpecError(f"dtype is {self.dtype!r}, expected one of {', '.join(STORAGE)}")
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
        if self.block_docs is not None and self.block_docs < 1:
            raise SpecError(f"block_docs is {self.block_docs}, expected at least 1")
        if "" in self.kept_columns or len(set(self.kept_columns)) < len(self.kept_columns):
            raise SpecError(f"kept_columns are {list(self.kept_columns)}, expected names that differ")
