"""The loader against a plain copy of the same bytes, and how well it mixes with a pool of 1/8 of the cache.

Limit: np.copyto of the memory-mapped shard into a buffer, in order, from a warm page cache. malloc keeps freed blocks,
as a training on a CPU sets it (`common.process`), and the start of the loader is counted.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harvest_speed import random_rows, write_cache
from benchmarks.table import markdown
from benchmarks.timing import interleaved
from sae_granary import open_cache
from sae_granary.cache.load.loader import Loader, Shuffle
from sae_granary.cache.load.plan import MAX_PARTNERS
from sae_granary.cache.load.selection import Filters, Holdout, Selection
from sae_granary.cache.read.reader import Cache
from sae_granary.common.process import keep_freed_memory

BATCH, D_IN = 4096, 384
HOOK = "layer_6"
ALL_ROWS: dict[str, Any] = {"selection": Selection(Filters(special=True, first_position=True), Holdout(fraction=0.0))}


def run(quick: bool) -> str:
    n_rows = 262_144 if quick else 1_048_576
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        write_cache(path, random_rows(n_rows, D_IN), n_rows // 2)
        opened = open_cache(path)
        return f"{_speed_table(opened, quick)}\n\n{_mixing_table(opened)}"


def copier(opened: Cache) -> Callable[[], None]:
    """The limit: np.copyto of the memory-mapped shards, one after the other, into one buffer."""
    shards = [opened.hook(HOOK).shard(i) for i in range(len(opened.shards))]
    buffer = np.empty_like(shards[0])

    def copy() -> None:
        for shard in shards:
            np.copyto(buffer[: len(shard)], shard)

    return copy


def _epoch(opened: Cache, **options: Any) -> Loader:
    return Loader(opened, HOOK, batch_size=BATCH, epochs=1, order=Shuffle(pool_rows=opened.n_rows // 8), **options)


def _speed_table(opened: Cache, quick: bool) -> str:
    keep_freed_memory()
    shards = [opened.hook(HOOK).shard(i) for i in range(len(opened.shards))]
    gb = sum(shard.nbytes for shard in shards) / 1e9

    def epoch(**options: Any) -> None:
        with _epoch(opened, **options) as loader:
            for _ in loader:
                pass

    def random_rows() -> None:
        # What a loader without blocks and pools does: each batch gathers its rows from the whole map.
        order = np.random.default_rng(0).permutation(len(shards[0]))
        for start in range(0, len(order), BATCH):
            torch.from_numpy(shards[0][order[start : start + BATCH]])

    runs = {"copy": copier(opened), "epoch": partial(epoch, **ALL_ROWS), "heldout": epoch, "random": random_rows}
    seconds = interleaved(runs, 3 if quick else 5)
    share = Loader(opened, HOOK, batch_size=BATCH).n_rows / opened.n_rows
    rows = [
        ["plain copy from the map (limit)", f"{gb / seconds['copy']:.2f}", "1.00"],
        ["shuffled batches, one epoch", f"{gb / seconds['epoch']:.2f}", f"{seconds['copy'] / seconds['epoch']:.2f}"],
        [
            f"the same by default filters: {share:.0%} of the rows",
            f"{share * gb / seconds['heldout']:.2f}",
            f"{share * seconds['copy'] / seconds['heldout']:.2f}",
        ],
        [
            "rows gathered at random from the map",
            f"{gb / len(shards) / seconds['random']:.2f}",
            f"{seconds['copy'] / len(shards) / seconds['random']:.2f}",
        ],
    ]
    title = (
        f"Loader: {opened.n_rows:,} rows of {D_IN} float32 ({gb:.2f} GB), batches of {BATCH}, pool 1/8 of the cache."
    )
    return f"{title}\n\n{markdown(['', 'GB/s', 'of the limit'], rows)}"


def _mixing_table(opened: Cache) -> str:
    with _epoch(opened, **ALL_ROWS, with_rows=True) as loader:
        block, order = loader.order.block_rows, loader.order
        measured = np.mean([partners(batch.row_ids.numpy() // block) for batch in loader if batch.row_ids is not None])
    uniform_ids = np.random.default_rng(0).permutation(opened.n_rows)
    uniform = np.mean(
        [partners(uniform_ids[i : i + BATCH] // block) for i in range(0, opened.n_rows - BATCH + 1, BATCH)]
    )
    rows = [
        ["uniform permutation of the cache", f"{uniform:.3f}"],
        [f"loader, blocks of {block} rows, pool of {order.max_pool_rows:,}", f"{measured:.3f}"],
        ["bound", f"{MAX_PARTNERS}"],
    ]
    return f"Mixing.\n\n{markdown(['', 'partners of a row from its own block in its batch'], rows)}"


def partners(blocks: np.ndarray) -> float:
    """Rows of its own block that a row of a batch meets there, on average, from the (B,) blocks of the rows."""
    counts = np.unique(blocks, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / len(blocks))
