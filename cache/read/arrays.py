"""Rows of one array of an open cache: memory-mapped shards along one dense axis."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from sae_granary.cache.errors import CacheError, CorruptCacheError, MissingFileError
from sae_granary.cache.format.affine import F32, Affine
from sae_granary.cache.format.layout import ArrayLayout, CacheLayout
from sae_granary.cache.format.storage import Array
from sae_granary.common.files import NO_FOLLOW, NO_WAIT, PLAIN, shortage
from sae_granary.common.process import keep_map

Copies = Mapping[Path, Path]  # files that are read from a copy: their path in the cache, and that of the copy
NO_COPIES: Copies = MappingProxyType({})
# Arrays of which this process has mapped shards: cache and array -> layout, shards (number, rows), copies.
_MAPPED: dict[tuple[Path, str], tuple[ArrayLayout, Sequence[tuple[int, int]], Copies]] = {}


def truncated_shards() -> str:
    """What to say when a mapped file has no byte where one is read: the shards that have another size by now."""
    lines = []
    for (root, _), (layout, shards, copies) in _MAPPED.items():
        for shard, n_rows in shards:
            file, n_bytes = root / layout.shard_path(shard), layout.shard_bytes(n_rows)
            path = copies.get(file, file)
            size = path.stat().st_size if path.exists() else 0
            found = f"{size:,} bytes are left of {n_bytes:,}"
            lines += [] if size == n_bytes else [f"error: {path} was truncated while it was read: {found}; restore it"]
    return "\n".join(lines[:3] or ["error: a file that is read through memory was truncated, or its disk fails"])


class RowArray:
    """An array over the rows 0..n-1 of the opened shards.

    `array[i]`, `array[a:b]` and `array[indices]` give numpy arrays; a slice inside one shard is a view of the memory
    map, anything else a copy. `shard(i)` is the map of the i-th opened shard. Maps are kept, those of all arrays
    together up to `most_maps`; then the oldest are dropped.
    """

    def __init__(
        self, root: Path, layout: ArrayLayout, shards: Sequence[tuple[int, int]], copies: Copies = NO_COPIES
    ) -> None:
        self.layout = layout
        self.dtype: np.dtype[Any] = layout.storage.numpy
        self._root, self._copies = root, copies
        self._shards = tuple(shards)  # (shard number, rows) of each opened shard
        self._starts = np.concatenate([[0], np.cumsum([n_rows for _, n_rows in shards], dtype=np.int64)])
        self._maps: dict[int, np.memmap[Any, Any]] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """(n_rows,) or (n_rows, d_in)."""
        return self.layout.shape(len(self))

    @property
    def n_shards(self) -> int:
        """Opened shards."""
        return len(self._shards)

    def path(self, i: int) -> Path:
        """The file of the i-th opened shard."""
        path = self._root / self.layout.shard_path(self._shards[i][0])
        return self._copies.get(path, path)

    def shard(self, i: int) -> Array:
        """The rows of the i-th opened shard, memory-mapped, read-only."""
        found = self._maps.get(i)
        if found is None:
            found = self._maps[i] = self.map(i)
            keep_map(self, i)
        return found

    def map(self, i: int) -> np.memmap[Any, Any]:
        """A new map of the i-th opened shard, which is not kept: for a single pass over many shards."""
        _MAPPED[self._root, self.layout.path] = (self.layout, self._shards, self._copies)
        with os.fdopen(self.open(i), "rb") as file:
            try:
                return np.memmap(file, self.layout.storage.numpy, "r", shape=self.layout.shape(self._shards[i][1]))
            except OSError as error:
                raise _unreadable(self.path(i), error) from None

    def open(self, i: int) -> int:
        """A descriptor of the file of the i-th opened shard. Raises CacheError if it is not as it was recorded."""
        shard, n_rows = self._shards[i]
        path = self.path(i) if self._copies else f"{self._root}/{self.layout.shard_path(shard)}"
        try:
            descriptor = os.open(path, os.O_RDONLY | NO_FOLLOW | NO_WAIT | PLAIN)
        except OSError as error:
            raise _unreadable(Path(path), error) from None
        if os.fstat(descriptor).st_size != self.layout.shard_bytes(n_rows):  # a map past the end would be a SIGBUS
            os.close(descriptor)
            raise CorruptCacheError(f"{path} has changed its size since the cache was opened")
        return descriptor

    def drop(self, i: int) -> None:
        """Forget the map of the i-th opened shard; it is closed when nothing refers to it any more."""
        self._maps.pop(i, None)

    @overload
    def __getitem__(self, index: int | np.integer[Any]) -> Any: ...
    @overload
    def __getitem__(self, index: slice | npt.NDArray[Any] | Sequence[int]) -> Array: ...
    def __getitem__(self, index: int | np.integer[Any] | slice | npt.NDArray[Any] | Sequence[int]) -> Any:
        if isinstance(index, slice):
            return self._slice(*index.indices(len(self)))
        if isinstance(index, int | np.integer):
            row = int(index) + (len(self) if index < 0 else 0)
            if not 0 <= row < len(self):
                raise IndexError(f"row {int(index)} is out of range: there are {len(self)} rows")
            i = int(np.searchsorted(self._starts, row, side="right")) - 1
            return self._view(i)[row - int(self._starts[i])]
        return self._take(np.asarray(index))

    def _view(self, i: int) -> Array:
        return np.asarray(self.shard(i))  # the subclass costs microseconds per index

    def _slice(self, start: int, stop: int, step: int) -> Array:
        if step != 1:
            return self._take(np.arange(start, stop, step))
        if start >= stop:
            return np.empty(self.layout.shape(0), dtype=self.dtype)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left")) - 1
        pieces = [
            self._view(i)[max(0, start - int(self._starts[i])) : stop - int(self._starts[i])]
            for i in range(first, last + 1)
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _take(self, index: npt.NDArray[Any]) -> Array:
        if index.ndim != 1 or (index.dtype.kind not in "iu" and index.size):
            raise IndexError(f"expected a one-dimensional array of integers, got {index.dtype.name}{index.shape}")
        rows = index.astype(np.int64)
        rows = np.where(rows < 0, rows + len(self), rows)
        if rows.size and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows {index.min()} to {index.max()} are out of range: there are {len(self)} rows")
        out = np.empty(self.layout.shape(len(rows)), dtype=self.dtype)
        shard = np.searchsorted(self._starts, rows, side="right") - 1
        for i in np.unique(shard).tolist():
            here = shard == i
            out[here] = self._view(i)[rows[here] - self._starts[i]]
        return out


class Column(RowArray):
    """A column of position metadata, or the row norms of a hook point."""

    def __repr__(self) -> str:
        return f"<Column {self.layout.path}: {len(self):,} rows of {self.dtype.name}>"


class HookRows(RowArray):
    """The activations of one hook point: (n_rows, d_in)."""

    scales: Column | None = None  # of dtypes with a scale per row
    affine: Affine | None = None

    @property
    def stored(self) -> RowArray:
        """The array as it is on disk; of most dtypes these are the rows themselves."""
        return self

    def block(self, i: int, start: int, stop: int) -> Array:
        """Rows start..stop of the i-th opened shard."""
        return np.asarray(self.shard(i)[start:stop])

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.layout.width or 1

    def __repr__(self) -> str:
        return f"<HookRows {self.layout.path}: {len(self):,} rows of {self.d_in} {self.dtype.name}>"


class CodedRows(HookRows):
    """The activations of one hook point of which codes and scales are stored; float32 rows are given.

    Nothing is a view of a memory map: what is asked for is decoded, `shard(i)` a whole shard at once.
    """

    def __init__(
        self,
        root: Path,
        layout: ArrayLayout,
        scales: ArrayLayout,
        affine: Affine,
        shards: Sequence[tuple[int, int]],
        copies: Copies = NO_COPIES,
    ) -> None:
        super().__init__(root, layout, shards, copies)
        self.dtype = layout.storage.decoded.numpy
        self.affine, self._decode = affine, affine.decode
        self._codes, self._scales = RowArray(root, layout, shards, copies), Column(root, scales, shards, copies)
        self.scales = self._scales

    @property
    def stored(self) -> RowArray:
        """The codes."""
        return self._codes

    def shard(self, i: int) -> F32:
        """The rows of the i-th opened shard, decoded."""
        return self.block(i, 0, self._shards[i][1])

    def block(self, i: int, start: int, stop: int) -> F32:
        """Rows start..stop of the i-th opened shard."""
        return self._decode(self._codes.shard(i)[start:stop], self._scales.shard(i)[start:stop])

    def __getitem__(self, index: Any) -> Any:
        return self._decode(self._codes[index], self._scales[index])


def open_hook(
    root: Path, layout: CacheLayout, hook: str, shards: Sequence[tuple[int, int]], copies: Copies = NO_COPIES
) -> HookRows:
    """The activations of a hook point over opened shards: (shard number, rows)."""
    values = layout.activations[hook]
    if layout.affines is None:
        return HookRows(root, values, shards, copies)
    return CodedRows(root, values, layout.scales[hook], layout.affines[hook], shards, copies)


def _unreadable(path: Path, error: OSError) -> CacheError:
    if isinstance(error, FileNotFoundError):
        return MissingFileError(f"{path} has gone since the cache was opened")
    if text := shortage(error, path):
        return CacheError(text)
    return CorruptCacheError(f"{path} cannot be opened: {error.strerror}")
