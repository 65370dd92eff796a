"""Check that the contents of shards agree with their records: row order, documents, statistics, padding.

Each check returns the first problem in one line, or None.
"""

from __future__ import annotations

import numpy as np

from sae_granary.cache.errors import CacheError
from sae_granary.cache.format.affine import is_scale
from sae_granary.cache.format.documents import read_doc_ids, read_kept_column
from sae_granary.cache.format.layout import documents_path
from sae_granary.cache.format.manifest import ShardRecord
from sae_granary.cache.format.records import load_record
from sae_granary.cache.format.stats import Moments, block_moments, merge_all
from sae_granary.cache.read.reader import Cache
from sae_granary.common.rows import FLAG_ABSENT


def check_rows(cache: Cache, i: int, record: ShardRecord) -> str | None:
    """The first thing that is wrong with the contents of a shard whose files have the right checksums."""
    problem = _check_order(cache, i, record) or _check_documents(cache, record)
    for hook in cache.manifest.hook_points:
        problem = problem or _check_statistics(cache, i, hook.name, record)
    return problem or _check_padding(cache, record)


def _check_order(cache: Cache, i: int, record: ShardRecord) -> str | None:
    window, position = cache.column("window").shard(i), cache.column("position").shard(i)
    if (int(window[0]), int(window[-1])) != (record.first_window, record.last_window):
        return f"windows are {window[0]} to {window[-1]}, expected {record.first_window} to {record.last_window}"
    if (window[1:] < window[:-1]).any():
        return "windows are not in order"
    if ((window[1:] == window[:-1]) & (position[1:] <= position[:-1])).any():
        return "positions do not ascend in a window"
    if (cache.column("flags").shard(i) & FLAG_ABSENT).any():
        return "rows that are present are flagged as absent"
    return None


def _check_documents(cache: Cache, record: ShardRecord) -> str | None:
    try:
        path = cache.path / documents_path(record.shard)
        ids = read_doc_ids(path)
        for name in cache.kept_columns:
            read_kept_column(path, name)
    except CacheError as error:
        return str(error)
    expected = record.documents
    found = (len(ids), ids[0], ids[-1]) if ids else None
    if found != (None if expected is None else (expected.n, expected.first, expected.last)):
        return f"documents are {found}, expected {expected} (number, first, last)"
    return None if ids == sorted(set(ids)) else "documents are not in order"


def _check_statistics(cache: Cache, i: int, hook: str, record: ShardRecord) -> str | None:
    rows, norms = cache.hook(hook), cache.norms(hook).shard(i)
    step = cache.layout.activations[hook].inner_rows
    scales = rows.scales
    if scales is not None and not is_scale(scales.shard(i)).all():
        return f"scales of {hook} hold numbers that are never stored"
    parts: list[Moments] = []
    for start in range(0, len(norms), step):
        moments, measured = block_moments(rows.block(i, start, start + step))
        parts.append(moments)
        if not np.allclose(measured, norms[start : start + step], rtol=1e-6, atol=0):
            return f"norms of {hook} do not fit its rows"
    stored = None if record.statistics is None else record.statistics[hook]
    if stored is None or not _close(merge_all(parts), stored):
        return f"statistics of {hook} do not fit its rows"
    return None


def _check_padding(cache: Cache, record: ShardRecord) -> str | None:
    """After the rows come fill values and the index, byte for byte."""
    for array in cache.layout.arrays:
        with (cache.path / array.shard_path(record.shard)).open("rb") as file:
            file.seek(record.n_rows * array.row_bytes)
            padding = array.block()[: array.padded_rows(record.n_rows) - record.n_rows]
            if file.read() != padding.tobytes() + array.index(record.n_rows):
                return f"{array.shard_path(record.shard)}: padding or sharding index is not as the format says"
    return None


def check_totals(cache: Cache) -> str | None:
    """The manifest's statistics are the merged ones of the records; window numbers ascend over shards."""
    for before, after in zip(cache.records, cache.records[1:], strict=False):
        if after.first_window <= before.last_window:
            return f"windows of shard {after.shard} do not follow those of shard {before.shard}"
    if cache.manifest.statistics is None:
        return None
    try:
        records = [load_record(cache.path, cache.manifest, record.shard) for record in cache.records]
    except CacheError:
        return None  # reported with the record
    for hook, stored in cache.manifest.statistics.items():
        if not _close(merge_all(r.statistics[hook] for r in records if r.statistics is not None), stored):
            return f"statistics of {hook} are not the merged ones of its shards"
    return None


def _close(a: Moments, b: Moments) -> bool:
    """Equal up to the order of summation, which differs between processors."""
    scale = np.sqrt(np.maximum(a.m2_D / a.n_rows, 0)) + np.abs(a.mean_D) + 1e-300
    if a.error_D is not None and b.error_D is not None and not np.allclose(a.error_D, b.error_D, rtol=1e-9, atol=0):
        return False  # rows alone do not tell it
    return (
        a.n_rows == b.n_rows
        and bool((np.abs(a.mean_D - b.mean_D) <= 1e-9 * scale).all())
        and bool((np.abs(a.m2_D - b.m2_D) <= 1e-9 * a.n_rows * scale**2).all())
    )
