"""How two caches differ: what they say of themselves, and the rows that both have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sae_granary.cache.format.manifest import differences
from sae_granary.cache.read.reader import Cache

BLOCK_ROWS = 1 << 14
_COLUMNS = ("token_id", "doc_id", "position")


@dataclass(frozen=True)
class HookDifference:
    """The activations of a hook point that both caches have, over their common rows."""

    n_rows: int  # that differ
    first_row: int | None
    largest: float  # absolute difference of a value
    relative: float  # root of: squared differences over squared values of the first cache


@dataclass(frozen=True)
class CacheDifference:
    """All that differs; rows are compared by their ordinals, the first to the first."""

    fields: dict[str, tuple[object, object]]  # of the description: (in the first, in the second)
    n_rows: tuple[int, int]
    columns: dict[str, int]  # column -> rows that differ
    hooks: dict[str, HookDifference]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        rows = any(self.columns.values()) or any(hook.n_rows for hook in self.hooks.values())
        return not self.fields and self.n_rows[0] == self.n_rows[1] and not rows

    def to_json(self) -> dict[str, Any]:
        """What `sae-cache diff --json` prints."""
        return {
            "same": self.same,
            "fields": {name: list(values) for name, values in self.fields.items()},
            "n_rows": list(self.n_rows),
            "columns": self.columns,
            "hooks": {name: vars(found) for name, found in self.hooks.items()},
        }


def diff(a: Cache, b: Cache) -> CacheDifference:
    """Compare two caches: descriptions, and every row that both have, in blocks."""
    n_rows = min(a.n_rows, b.n_rows)
    columns = dict.fromkeys(_COLUMNS, 0)
    for start in range(0, n_rows, BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, n_rows))
        for name in _COLUMNS:
            columns[name] += int(np.count_nonzero(a.column(name)[rows] != b.column(name)[rows]))
    both = {name: (hook, b.hook_points[name]) for name, hook in a.hook_points.items() if name in b.hook_points}
    hooks = {name: _compare(a, b, name, n_rows) for name, (one, other) in both.items() if one.d_in == other.d_in}
    fields = differences(a.manifest, b.manifest)
    added = tuple(_added(cache) for cache in (a, b))
    if added[0] != added[1]:
        fields["added hook points"] = (added[0], added[1])
    return CacheDifference(fields, (a.n_rows, b.n_rows), columns, hooks)


def _added(cache: Cache) -> str:
    own = {hook.name for hook in cache.manifest.hook_points}
    return ", ".join(name for name in cache.hook_points if name not in own) or "none"


def _compare(a: Cache, b: Cache, name: str, n_rows: int) -> HookDifference:
    differing, first, largest, squares, error = 0, None, 0.0, 0.0, 0.0
    for start in range(0, n_rows, BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, n_rows))
        x, y = (np.asarray(cache.hook(name)[rows]).astype(np.float32) for cache in (a, b))
        unequal = np.flatnonzero((x != y).any(axis=1))
        squares += float(np.square(x, dtype=np.float64).sum())
        if len(unequal):
            first = start + int(unequal[0]) if first is None else first
            gap = np.abs(x[unequal].astype(np.float64) - y[unequal])
            differing += len(unequal)
            largest = max(largest, float(gap.max()))
            error += float((gap**2).sum())
    return HookDifference(differing, first, largest, float(np.sqrt(error / squares)) if squares else 0.0)
