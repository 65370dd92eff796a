"""The count of a run's rows, kept for the next run: on a cache of a billion rows it takes a minute.

A count is kept in $XDG_CACHE_HOME/sae-granary/counts (by default in ~/.cache), never in the cache or beside the runs.
The name of its file is a hash of everything that it follows from: the filters, and for each shard its rows and the
checksums of the columns that were read.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sae_granary.cache.format.layout import ArrayLayout
from sae_granary.cache.format.parse import LazyRecords
from sae_granary.cache.load.selection import Counts, Selection, account
from sae_granary.cache.read.reader import Cache, ShardView
from sae_granary.common.signed import DamagedFileError, Fields, digest, write_signed
from sae_granary.common.threads import waiting

KEPT_FROM = 2**24  # rows; fewer are counted within a second
VERSION = 1


def counted(cache: Cache, selection: Selection, hooks: Sequence[str]) -> Counts:
    """Where every row of the cache goes (`account`), from the count that an earlier run kept where there is one."""
    if cache.n_rows < KEPT_FROM:
        return account(cache, selection, hooks)
    selection = selection.resolve(cache)
    file = _folder() / f"{_key(cache, selection, hooks)}.json"
    if (kept := _read(file)) is not None and kept.total == cache.n_rows:
        return kept
    with waiting(f"counting the {cache.n_rows:,} rows of {cache.path}") as progress:
        counts = account(cache, selection, hooks, progress)
    with contextlib.suppress(OSError):  # a home that cannot be written to: the next run counts again
        file.parent.mkdir(parents=True, exist_ok=True)
        write_signed(file, {"version": VERSION, "counts": counts.to_json()})
    return counts


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sae-granary" / "counts"


def _key(cache: Cache, selection: Selection, hooks: Sequence[str]) -> str:
    columns = [(cache, cache.layout.columns[name]) for name in selection.columns if name != "norm"]
    if "norm" in selection.columns:
        columns += [(cache.holder(hook), cache.holder(hook).layout.norms[hook]) for hook in hooks]
    checksums = [_checksums(holder, array, cache.shards) for holder, array in columns]
    shards = [[shard.index, shard.n_rows, *found] for shard, *found in zip(cache.shards, *checksums, strict=True)]
    filters, holdout = asdict(selection.filters), asdict(selection.holdout)
    return digest(json.dumps([VERSION, filters, holdout, [column.path for _, column in columns], shards]).encode())


def _checksums(holder: Cache, column: ArrayLayout, shards: Sequence[ShardView]) -> list[str]:
    """The checksum of a column in each shard; of a large cache that of its manifest, which lists them all."""
    if isinstance(holder.records, LazyRecords):
        return [holder.records.checksum] * len(shards)
    return [holder.records[shard.index].files[column.shard_path(shard.index)].xxh3 for shard in shards]


def _read(file: Path) -> Counts | None:
    try:
        fields = Fields.of_file(file, "", signed_since=VERSION).nested("counts")
        return Counts(**{name: fields.integer(name) for name in vars(Counts())})
    except (DamagedFileError, OSError):
        return None
