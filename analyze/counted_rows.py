"""The rows that count in descriptions of latents: those that a training reads by default."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_granary.cache.load.selection import Filters
from sae_granary.cache.read.reader import Cache
from sae_granary.common.rows import FLAG_ABSENT, FLAG_SPECIAL


class CountedFlags:
    """A cache's flags, with FLAG_SPECIAL also on other rows that no training reads by default.

    These are absent rows and, for causal models, position 0 of each context: an attention sink, whose rows are so large
    that they would be the strongest example of many latents. Indexed by a slice or an array of rows.
    """

    def __init__(self, cache: Cache) -> None:
        self._flags = cache.column("flags")
        self._position = None if keeps_first(cache) else cache.column("position")

    def __getitem__(self, rows: Any) -> NDArray[np.uint8]:
        flags: NDArray[np.uint8] = self._flags[rows]
        dropped = flags & FLAG_ABSENT != 0
        if self._position is not None:
            dropped |= self._position[rows] == 0
        return flags | np.where(dropped, FLAG_SPECIAL, 0).astype(np.uint8)


def keeps_first(cache: Cache) -> bool:
    """Whether position 0 of a context counts: yes, except for causal models."""
    return bool(Filters().resolve(cache).first_position)


def left_out(cache: Cache) -> str:
    """The excluded rows, in words."""
    return "special tokens left out" if keeps_first(cache) else "special tokens and position 0 left out"
