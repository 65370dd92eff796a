"""Open a cache and read it: rows by slice or index, metadata, documents, statistics. Imports neither zarr nor torch.

Ordinals 0..n_rows-1 are dense over the opened shards; `row_id = shard * rows_per_shard + offset` is forever.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sae_granary.cache.errors import CorruptCacheError, IncompleteCacheError, RowLookupError, UnknownNameError
from sae_granary.cache.format.layout import COLUMNS, VOCABULARY, ArrayLayout
from sae_granary.cache.format.manifest import Manifest, ShardRecord
from sae_granary.cache.format.places import find_cache
from sae_granary.cache.format.records import committed, load_manifest, load_record
from sae_granary.cache.format.signed import read_bytes
from sae_granary.cache.format.spec import Unit
from sae_granary.cache.format.stats import Moments, Stats, make_stats, merge_all
from sae_granary.cache.format.storage import STORAGE
from sae_granary.cache.read import render
from sae_granary.cache.read.arrays import Column, HookRows, open_hook
from sae_granary.cache.read.check import check_files, incomplete_message
from sae_granary.cache.read.context import Context, join_tokens, rows_around
from sae_granary.cache.read.documents import Documents
from sae_granary.common.rows import DocumentRow, HookPoint, Scalar
from sae_granary.common.signed import digest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ShardView:
    """An opened shard: its number, the rows present in it, and the permanent id of the first of them."""

    index: int
    n_rows: int
    first_row_id: int


def open_cache(
    path: str | os.PathLike[str], *, shards: Collection[int] | None = None, allow_incomplete: bool = False
) -> Cache:
    """Open a cache: all its committed shards, or those numbered in `shards`.

    Existence and exact size of every file of the opened shards are checked here; checksums are `verify`'s. A cache
    whose harvest has not finished needs `allow_incomplete`; it is read as it stands now. While a complete cache is
    extended, `allow_incomplete` gives the shards that the extension has committed, too.

    >>> from sae_granary import open_cache
    >>> rows = open_cache("cache/demo_l3")
    >>> rows.hook("layer_3")[:4].shape, rows.document(0).source
    ((4, 384), 'pydoc_data.topics:assert')

    Raises NotACacheError, IncompleteCacheError, UnsupportedFormatError, CorruptCacheError (a file is missing or of
    another size), and UnknownNameError for a shard that is not there.
    """
    path = find_cache(path)
    manifest = load_manifest(path)
    records = manifest.shards
    if allow_incomplete or not manifest.complete:
        manifest, records = committed(path, manifest)
    if not manifest.complete and not allow_incomplete:
        raise IncompleteCacheError(incomplete_message(path, records))
    numbers = range(len(records)) if shards is None else sorted(set(shards))
    unknown = [number for number in numbers if not 0 <= number < len(records)]
    if unknown:
        raise UnknownNameError(f"{path} has no shard {unknown[0]}: there are {len(records)}, counted from 0")
    opened = [records[number] for number in numbers]
    check_files(path, manifest, opened)
    return Cache(path, manifest, records, opened)


class Cache:
    """An open cache; see `open_cache`. Nothing is ever written to it."""

    def __init__(
        self, path: Path, manifest: Manifest, records: Sequence[ShardRecord], opened: Sequence[ShardRecord]
    ) -> None:
        self.path, self.manifest = path, manifest
        self.records = tuple(records)  # of all committed shards
        self.opened = tuple(opened)
        self.complete = manifest.complete
        self.unit: Unit = manifest.unit
        self.dtype = manifest.dtype
        self.storage = STORAGE[manifest.dtype]
        self.hook_points: dict[str, HookPoint] = {hook.name: hook for hook in manifest.hook_points}
        self.layout = manifest.layout
        self.kept_columns = manifest.kept_columns  # names for `document_column`
        self.shards = tuple(
            ShardView(record.shard, record.n_rows, record.shard * manifest.rows_per_shard) for record in opened
        )
        self.n_rows = sum(shard.n_rows for shard in self.shards)
        # (n_shards + 1,) ordinal of the first row of each opened shard, then the number of rows
        self.starts = np.concatenate([[0], np.cumsum([shard.n_rows for shard in self.shards], dtype=np.int64)])
        self._sizes = [(shard.index, shard.n_rows) for shard in self.shards]
        self._hooks: dict[str, HookRows] = {}
        self._columns: dict[str, Column] = {}

    def __len__(self) -> int:
        return self.n_rows

    def __repr__(self) -> str:
        return render.text(self.facts())

    def _repr_html_(self) -> str:
        return render.html(self.facts())

    def facts(self) -> dict[str, str]:
        """Label -> value: what `repr` shows."""
        return render.facts(self.path, self.manifest, self.opened, len(self.records))

    def hook(self, name: str | None = None) -> HookRows:
        """The activations of a hook point; the name may be left out where there is only one."""
        name = self.hook_name(name)
        if name not in self._hooks:
            self._hooks[name] = open_hook(self.path, self.layout, name, self._sizes)
        return self._hooks[name]

    def tensor(self, rows: slice | npt.NDArray[np.int64] | Sequence[int], *, hook: str | None = None) -> Tensor:
        """Some rows (n, d_in) of a hook point as a torch tensor: a copy on the CPU, in the dtype that `hook` gives."""
        from sae_granary.cache.read.tensors import as_tensor

        return as_tensor(self.hook(hook)[rows])

    def norms(self, name: str | None = None) -> Column:
        """The float32 norms of the stored rows of a hook point."""
        return self._column(self.layout.norms[self.hook_name(name)])

    def column(self, name: str) -> Column:
        """Position metadata: token_id, doc_id, window, position, doc_position or flags."""
        if name not in COLUMNS:
            raise UnknownNameError(f"no column {name!r}: there are {', '.join(COLUMNS)}")
        return self._column(self.layout.columns[name])

    def _column(self, layout: ArrayLayout) -> Column:
        if layout.path not in self._columns:
            self._columns[layout.path] = Column(self.path, layout, self._sizes)
        return self._columns[layout.path]

    def hook_name(self, name: str | None = None) -> str:
        """The name itself where there is such a hook point, or the only one's for None."""
        if name is None and len(self.hook_points) == 1:
            return next(iter(self.hook_points))
        if name is None or name not in self.hook_points:
            wanted = "name a hook point" if name is None else f"no hook point {name!r}"
            raise UnknownNameError(f"{self.path}: {wanted}: there are {', '.join(self.hook_points)}")
        return name

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
        """Where the rows of permanent ids stand now; they are of opened shards."""
        shard, offset = np.divmod(row_ids, self.manifest.rows_per_shard)
        found: npt.NDArray[np.int64] = self.starts[np.searchsorted([s.index for s in self.shards], shard)] + offset
        return found

    def document(self, row: int) -> DocumentRow:
        """The document that a row comes from."""
        doc_id = int(self.column("doc_id")[row])
        document = self.find_document(doc_id)
        if document is None:
            raise RowLookupError(f"{self.path}: document {doc_id} of row {row} is not stored")
        return document

    def find_document(self, doc_id: int) -> DocumentRow | None:
        """The document of an id, or None where none of its rows were stored."""
        return self._documents.find(doc_id)

    def document_ids(self) -> list[int]:
        """The ids of all stored documents, ascending."""
        return self._documents.ids()

    def document_column(self, name: str) -> list[Scalar]:
        """A column that the harvest kept (`--keep-columns`), one value per document, in the order of `document_ids`.

        Raises UnknownNameError, which names the columns that were kept.
        """
        return self._documents.column(name)

    @cached_property
    def _documents(self) -> Documents:
        return Documents(self.path, self.records, self.kept_columns)

    @cached_property
    def vocabulary(self) -> list[str] | None:
        """Token id -> string as the tokenizer writes it, or None where the harvest stored none."""
        if self.manifest.vocabulary is None:
            return None
        data = read_bytes(self.path / VOCABULARY)
        if digest(data) != self.manifest.vocabulary.xxh3:
            raise CorruptCacheError(f"{self.path / VOCABULARY}: the checksum does not fit; restore it from a copy")
        words: list[str] = json.loads(data)
        return words

    def token(self, row: int) -> str | int:
        """The token of a row: its string where the cache has a vocabulary, else its id."""
        if self.unit == "text":
            raise RowLookupError(f"{self.path}: a row is a whole text here, not a token; use document(row)")
        token_id = int(self.column("token_id")[row])
        words = self.vocabulary
        return words[token_id] if words is not None and 0 <= token_id < len(words) else token_id

    def context(self, row: int, before: int = 10, after: int = 10) -> Context:
        """The tokens around a row in its own document, and their text. Special tokens are left out."""
        row = int(row) + (len(self) if row < 0 else 0)
        document = self.find_document(int(self.column("doc_id")[row]))
        if self.unit == "text":
            return Context(row, (row,), (), -1, document.text if document else "", document)
        rows = rows_around(self.column("doc_id"), self.column("flags"), row, before, after)
        tokens = tuple(self.token(r) for r in rows)
        return Context(row, tuple(rows), tokens, rows.index(row), join_tokens(tokens), document)

    def stats(self, hook: str | None = None) -> Stats:
        """Statistics of the opened rows of a hook point: every stored row counts, special tokens too."""
        name = self.hook_name(hook)
        return make_stats(self.moments(name), [self.norms(name).shard(i) for i in range(len(self.shards))])

    def moments(self, hook: str | None = None) -> Moments:
        """Count, mean and squared deviations of the opened rows of a hook point; no shard is read for it."""
        name = self.hook_name(hook)
        if self.manifest.statistics is not None and len(self.opened) == len(self.records):
            return self.manifest.statistics[name]
        records = [load_record(self.path, self.manifest, record.shard) for record in self.opened]
        if not records:
            raise RowLookupError(f"{self.path}: no rows, so no statistics")
        return merge_all(r.statistics[name] for r in records if r.statistics is not None)

    @property
    def n_bytes(self) -> int:
        """Bytes of the opened shards."""
        return sum(record.n_bytes for record in self.opened)
