"""Open a cache and read it: rows by slice or index, metadata, documents, statistics. Imports neither zarr nor torch.

Ordinals 0..n_rows-1 are dense over the opened shards; `row_id = shard * rows_per_shard + offset` is forever.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sae_granary.cache.errors import IncompleteCacheError, RowLookupError, UnknownNameError
from sae_granary.cache.format.layout import COLUMNS, ArrayLayout
from sae_granary.cache.format.manifest import FileEntry, Manifest, ShardRecord
from sae_granary.cache.format.parse import select_records, sizes_of
from sae_granary.cache.format.places import find_cache
from sae_granary.cache.format.records import committed, load_manifest, load_record
from sae_granary.cache.format.spec import Unit
from sae_granary.cache.format.stats import Moments, Stats, make_stats, merge_all
from sae_granary.cache.format.storage import STORAGE
from sae_granary.cache.read import render
from sae_granary.cache.read.added import additions, hooks_of, shorter
from sae_granary.cache.read.arrays import Column, HookRows, open_hook
from sae_granary.cache.read.check import Enter, Fetcher, check_files, incomplete_message, removal_is_clear
from sae_granary.cache.read.texts import RowTexts
from sae_granary.common.rows import HookPoint

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ShardView:
    """An opened shard: its number, the rows present in it, and the permanent id of the first of them."""

    index: int
    n_rows: int
    first_row_id: int


def open_local(
    path: str | os.PathLike[str],
    *,
    shards: Collection[int] | None = None,
    allow_incomplete: bool = False,
    partial: bool = False,
) -> Cache:
    """Open a cache of this machine by its path, or by its name in GRANARY_CACHE_DIR; see `cache.opening.open_cache`."""
    path = find_cache(path)
    manifest = load_manifest(path)
    records = manifest.shards
    with removal_is_clear(path):
        if allow_incomplete or not manifest.complete:
            manifest, records = committed(path, manifest)
        if not manifest.complete and not allow_incomplete:
            raise IncompleteCacheError(incomplete_message(path, records))
        numbers = range(len(records)) if shards is None else sorted(set(shards))
        unknown = [number for number in numbers if not 0 <= number < len(records)]
        if unknown:
            raise UnknownNameError(f"{path} has no shard {unknown[0]}: there are {len(records)}, counted from 0")
        opened = select_records(records, numbers)
        check_files(path, manifest, opened, partial=partial)
        return Cache(path, manifest, records, opened)


class Cache(RowTexts):
    """An open cache; see `cache.opening.open_cache`. Nothing is ever written to it."""

    def __init__(
        self, path: Path, manifest: Manifest, records: Sequence[ShardRecord], opened: Sequence[ShardRecord]
    ) -> None:
        self.path, self.manifest = path, manifest
        self.records, self.opened = records, opened  # of all committed shards, of the opened ones
        self.complete = manifest.complete
        self.unit: Unit = manifest.unit
        self.dtype = manifest.dtype
        self.storage = STORAGE[manifest.dtype]
        self.additions = additions(path, manifest)
        self._added = hooks_of(self.additions, self.opened)
        self.hook_points: dict[str, HookPoint] = {hook.name: hook for hook in manifest.hook_points}
        self.hook_points |= {name: hook for name, (hook, _) in self._added.items()}
        self.layout = manifest.layout
        self.kept_columns = manifest.kept_columns  # names for `document_column`
        self.shards = tuple(
            ShardView(shard, n_rows, shard * manifest.rows_per_shard) for shard, n_rows in sizes_of(opened)
        )
        self.n_rows = sum(shard.n_rows for shard in self.shards)
        # (n_shards + 1,) ordinal of the first row of each opened shard, then the number of rows
        self.starts = np.concatenate([[0], np.cumsum([shard.n_rows for shard in self.shards], dtype=np.int64)])
        self._sizes = [(shard.index, shard.n_rows) for shard in self.shards]
        self._hooks: dict[str, HookRows] = {}
        self._columns: dict[str, Column] = {}
        self._parts: dict[Path, Cache] = {}
        self._copies: dict[Path, Path] = {}
        self.fetcher: Fetcher | None = None  # where activations are fetched when they are read

    def __len__(self) -> int:
        return self.n_rows

    def __repr__(self) -> str:
        return render.text(self.facts())

    def _repr_html_(self) -> str:
        return render.html(self.facts())

    def facts(self) -> dict[str, str]:
        """Label -> value: what `repr` shows."""
        lines = render.facts(self.path, self.manifest, self.opened, len(self.records), self.n_bytes)
        for name, (hook, _) in self._added.items():
            lines["hook points"] += f", {name} (d_in {hook.d_in}, added)"
        return lines

    def hook(self, name: str | None = None) -> HookRows:
        """The activations of a hook point; the name may be left out where there is only one."""
        name = self.hook_name(name)
        if name not in self._hooks:
            holder = self.holder(name)
            self._hooks[name] = open_hook(holder.path, holder.layout, name, self._sizes, self._copies)
        return self._hooks[name]

    def tensor(self, rows: slice | npt.NDArray[np.int64] | Sequence[int], *, hook: str | None = None) -> Tensor:
        """Some rows (n, d_in) of a hook point as a torch tensor: a copy on the CPU, in the dtype that `hook` gives."""
        import torch

        values = np.array(self.hook(hook)[rows])
        if values.dtype.name == "bfloat16":  # ml_dtypes' arrays torch does not take
            return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(values)

    def norms(self, name: str | None = None) -> Column:
        """The float32 norms of the stored rows of a hook point."""
        name = self.hook_name(name)
        holder = self.holder(name)
        return holder._column(holder.layout.norms[name])

    def column(self, name: str) -> Column:
        """Position metadata: token_id, doc_id, window, position, doc_position or flags."""
        if name not in COLUMNS:
            raise UnknownNameError(f"no column {name!r}: there are {', '.join(COLUMNS)}")
        return self._column(self.layout.columns[name])

    def _column(self, layout: ArrayLayout) -> Column:
        if layout.path not in self._columns:
            self._columns[layout.path] = Column(self.path, layout, self._sizes, self._copies)
        return self._columns[layout.path]

    def hook_name(self, name: str | None = None) -> str:
        """The name itself where there is such a hook point; for None that of the only one that was not added."""
        if name is None and len(self.manifest.hook_points) == 1:
            return self.manifest.hook_points[0].name
        if name is None or name not in self.hook_points:
            wanted = "name a hook point" if name is None else f"no hook point {name!r}"
            raise UnknownNameError(
                f"{self.path}: {wanted}: there are {', '.join(self.hook_points)}"
                f"{shorter(name, self.additions, self.opened)}"
            )
        return name

    def holder(self, hook: str) -> Cache:
        """The cache that holds the files of a hook point: this one, or the part that was added."""
        if hook not in self._added:
            return self
        part = self._added[hook][1]
        if part.path not in self._parts:
            self._parts[part.path] = open_local(
                part.path, shards=[shard.index for shard in self.shards], partial=self.fetcher is not None
            )
            self._parts[part.path]._copies = self._copies
        return self._parts[part.path]

    def files_of(self, hooks: Sequence[str]) -> Iterator[tuple[str, Cache, FileEntry]]:
        """Path, holder, record of each file of the opened shards that hook points are read from, with all columns."""
        for hook in hooks:
            holder = self.holder(hook)
            arrays = (holder.layout.activations, holder.layout.norms, holder.layout.scales)
            yield from self._files([layouts[hook] for layouts in arrays if hook in layouts], holder)
        yield from self._files(list(self.layout.columns.values()), self)

    def _files(self, arrays: Sequence[ArrayLayout], holder: Cache) -> Iterator[tuple[str, Cache, FileEntry]]:
        for shard in self.shards:
            entries = holder.records[shard.index].files
            for path in (array.shard_path(shard.index) for array in arrays):
                yield path, holder, entries[path]

    def read_copies(self, copies: Mapping[Path, Path]) -> None:
        """Read files of activations, norms and columns from copies from now on: path in the cache -> path of a copy."""
        self._copies |= copies
        for part in (self, *self._parts.values()):
            part._hooks.clear()
            part._columns.clear()

    def place_of(self, path: str) -> Path:
        """Where a file of the cache is read: there, or from its copy."""
        return self._copies.get(self.path / path, self.path / path)

    def reading(
        self, hooks: Sequence[str], closed: Callable[[], bool] = lambda: False
    ) -> AbstractContextManager[Enter]:
        """Context manager: gives what is called before activations of shards are read; it fetches them if need be."""
        return nullcontext(lambda now, after: None) if self.fetcher is None else self.fetcher.reading(hooks, closed)

    def shard_path(self, hook: str | None, i: int) -> Path:
        """The file that holds a hook point's rows of the i-th opened shard, from byte 0."""
        return self.hook(hook).path(i)

    def row_ids(self, rows: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The permanent ids of ordinals."""
        ordinals = np.asarray(rows, dtype=np.int64)
        shard = np.searchsorted(self.starts, ordinals, side="right") - 1
        first = np.array([view.first_row_id for view in self.shards], dtype=np.int64)
        ids: npt.NDArray[np.int64] = first[shard] + (ordinals - self.starts[shard])
        return ids

    def ordinals(self, row_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The ordinals of rows by their permanent ids; the rows must be of opened shards."""
        shard, offset = np.divmod(row_ids, self.manifest.rows_per_shard)
        found: npt.NDArray[np.int64] = self.starts[np.searchsorted([s.index for s in self.shards], shard)] + offset
        return found

    def stats(self, hook: str | None = None) -> Stats:
        """Statistics of the opened rows of a hook point: every stored row counts, special tokens too."""
        name = self.hook_name(hook)
        norms = self.norms(name)
        return make_stats(self.moments(name), lambda: map(norms.map, range(norms.n_shards)))

    def moments(self, hook: str | None = None) -> Moments:
        """Count, mean and squared deviations of the opened rows of a hook point; no shard is read for it."""
        name = self.hook_name(hook)
        if name in self._added:
            return self.holder(name).moments(name)
        if self.manifest.statistics is not None and len(self.opened) == len(self.records):
            return self.manifest.statistics[name]
        records = [load_record(self.path, self.manifest, record.shard) for record in self.opened]
        if not records:
            raise RowLookupError(f"{self.path}: no rows, so no statistics")
        return merge_all(r.statistics[name] for r in records if r.statistics is not None)

    @property
    def n_bytes(self) -> int:
        """Bytes of the opened shards."""
        added = {id(part): part.n_bytes(self.opened) for _, part in self._added.values()}
        return sum(record.n_bytes for record in self.opened) + sum(added.values())
