"""Our loader and SAELens' cached activations on the same rows, beside a plain copy of them from a warm page cache.

Ours runs over one epoch with its start counted; SAELens' store is warm and continues. With --keep-freed malloc keeps
freed blocks for both, as our trainer sets it and SAELens' does not. dictionary_learning and sparsify have no cached
form: they train on what a language model has just computed.

Column 0 of a row is its number, so that the rows of one context can be counted in a batch.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from benchmarks.harvest_speed import random_rows, write_cache
from benchmarks.loader_speed import ALL_ROWS, BATCH, HOOK, copier, partners
from benchmarks.peers import saelens_cache
from benchmarks.peers.saelens_cache import CONTEXT
from benchmarks.table import markdown
from benchmarks.timing import interleaved
from sae_granary import open_cache
from sae_granary.cache.load.loader import Loader, Shuffle
from sae_granary.cache.read.reader import Cache
from sae_granary.common.process import keep_freed_memory
from sae_granary.common.rows import Rows

MIN_BATCHES = 32  # of SAELens per turn


class Contestant(NamedTuple):
    n_rows: int  # per turn
    batches: Callable[[], Iterable[Tensor]]  # one turn


def table(args: argparse.Namespace) -> str:
    """Write both caches, measure and return the table."""
    if args.keep_freed:
        keep_freed_memory()
    rows = numbered_rows(args.rows, args.d_in)
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = Path(folder) / "saelens", Path(folder) / "ours"
        saelens_cache.write(rows.activations[HOOK], theirs)
        write_cache(ours, rows, args.rows // 2)
        opened = open_cache(ours)
        return measure(opened, our_loaders(opened, args) | saelens_stores(theirs, args), args)


def numbered_rows(n_rows: int, d_in: int) -> Rows:
    """Random rows whose first column is the number of the row."""
    if n_rows % CONTEXT or not 16 * BATCH <= n_rows < 2**24:
        raise SystemExit(f"--rows is {n_rows}: give a multiple of {CONTEXT} between {16 * BATCH} and {2**24}")
    rows = random_rows(n_rows, d_in)
    rows.activations[HOOK][:, 0] = np.arange(n_rows)  # exact in float32 below 2**24
    return rows


def our_loaders(opened: Cache, args: argparse.Namespace) -> dict[str, Contestant]:
    """Every row, and the rows that are left by default."""

    def epoch(**options: Any) -> Loader:
        pool = opened.n_rows // 8
        return Loader(
            opened, HOOK, batch_size=BATCH, epochs=1, order=Shuffle(pool_rows=pool), device=args.device, **options
        )

    def contestant(**options: Any) -> Contestant:
        return Contestant(epoch(**options).n_rows, lambda: (batch.x for batch in epoch(**options)))

    return {"ours, pool 1/8": contestant(**ALL_ROWS), "ours, default filters": contestant()}


def saelens_stores(folder: Path, args: argparse.Namespace) -> dict[str, Contestant]:
    """Half of the buffer kept for mixing, its default, in one as large as our pool; as large as the cache; in order."""

    def contestant(buffer_rows: int, mixing: float) -> Contestant:
        store = saelens_cache.batches(folder, args.d_in, BATCH, args.device, buffer_rows, mixing)
        n_batches = max(MIN_BATCHES, buffer_rows // (2 * BATCH))  # what is served between two refills, or more
        return Contestant(BATCH * n_batches, lambda: islice(store, n_batches))

    stores = {"SAELens, buffer 1/8": contestant(args.rows // 8, 0.5)}
    if args.whole:
        stores["SAELens, buffer 1/1"] = contestant(args.rows, 0.5)
    return stores | {"SAELens, in order": contestant(BATCH, 0.0)}


def measure(opened: Cache, contestants: dict[str, Contestant], args: argparse.Namespace) -> str:
    """Time a turn of each beside the copy, and count the rows of a context that meet."""
    runs: dict[str, Callable[[], object]] = {"plain copy from the map (limit)": copier(opened)}
    runs |= {name: partial(exhaust, each.batches) for name, each in contestants.items()}
    seconds = interleaved(runs, args.repeats)
    n_rows = {name: contestants[name].n_rows if name in contestants else opened.n_rows for name in runs}
    speed = {name: n_rows[name] / seconds[name] for name in runs}
    limit = next(iter(speed.values()))
    lines = []
    for name, rate in speed.items():
        against = f"{speed['ours, pool 1/8'] / rate:.1f}" if name.startswith("SAELens") else ""
        met = f"{context_partners(contestants[name].batches()):.2f}" if name in contestants else ""
        lines.append([name, f"{rate:,.0f}", f"{rate * args.d_in * 4 / 1e9:.2f}", f"{rate / limit:.3f}", against, met])
    header = ["", "rows/s", "GB/s", "of the limit", "times ours", "partners from its context"]
    title = f"Loader: {opened.n_rows:,} rows of {args.d_in} float32, batches of {BATCH} on {args.device}, pool 1/8"
    title += f"; malloc {'keeps freed blocks' if args.keep_freed else 'as it is'}."
    return f"{title}\n\n{markdown(header, lines)}"


def exhaust(batches: Callable[[], Iterable[Tensor]]) -> None:
    """Draw all batches of a turn."""
    for _ in batches():
        pass


def context_partners(batches: Iterable[Tensor]) -> float:
    """Rows of its own context that a row meets in its batch, on average."""
    return float(np.mean([partners(x[:, 0].cpu().numpy().astype(np.int64) // CONTEXT) for x in batches]))
