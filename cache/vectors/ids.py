"""Whether an id was seen before, at 8 bytes per id."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from sae_granary.common.rows import Scalar

Keys = npt.NDArray[np.uint64]


class SeenIds:
    """Ids as sorted arrays of 64-bit hashes, merged as they grow. Of 10 million ids, two collide in 1 of 370,000."""

    def __init__(self) -> None:
        self._runs: list[Keys] = []

    def add(self, ids: Sequence[Scalar]) -> int | None:
        """Add ids; the index of the first one that was there before, or None."""
        keys = np.array([xxhash.xxh3_64_intdigest(f"{type(i).__name__}:{i}".encode()) for i in ids], np.uint64)
        order = np.argsort(keys, kind="stable")
        run = keys[order]
        seen = np.zeros(len(keys), np.bool_)
        seen[order[1:][run[1:] == run[:-1]]] = True
        for other in self._runs:
            at = np.minimum(np.searchsorted(other, keys), len(other) - 1)
            seen |= other[at] == keys
        if seen.any():
            return int(seen.argmax())
        if len(run):
            self._runs.append(run)
        while len(self._runs) > 1 and len(self._runs[-1]) * 2 > len(self._runs[-2]):
            last = self._runs.pop()
            self._runs[-1] = np.sort(np.concatenate([self._runs[-1], last]), kind="stable")
        return None
