"""Shuffled batches of a cache on a device, prefetched, with a state of three integers.

A background thread assembles pools (`cache.order`) from the memory-mapped shards, in disk order; batches are drawn
from the pool in the order of `cache.shuffle`, on the device. Filtered and held-out rows are stepped over: a batch is
the next survivors, the cursor counts all rows. Two pools exist at a time, so memory is O(pool).

Shapes: B batch rows, D = d_in, P rows of a pool, S surviving rows of a pool.
"""

from __future__ import annotations

import queue
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.errors import SelectionError
from cache.order import Order, PoolPlan, plan_order
from cache.prefetch import Prefetcher
from cache.selection import Counts, Filters, Holdout, Part, Selection, account, shard_columns
from cache.staging import Buffer, as_integers, make_buffer, n_copy_threads

if TYPE_CHECKING:
    from cache.reader import Cache

__all__ = ["Batch", "Counts", "Filters", "Holdout", "Loader", "LoaderState"]


@dataclass(frozen=True)
class LoaderState:
    """Where a loader stands. The cursor counts the rows of the epoch's order, filtered ones included."""

    seed: int
    epoch: int = 0
    cursor: int = 0


@dataclass(frozen=True)
class Batch:
    """B rows on the device, and the state after them."""

    x: Tensor | dict[str, Tensor]  # (B, D), or one per hook point, rows aligned
    state: LoaderState
    row_ids: Tensor | None = None  # (B,) permanent row ids, on the CPU, when asked for

    @property
    def n_rows(self) -> int:
        """B."""
        return len(self.x) if isinstance(self.x, Tensor) else len(next(iter(self.x.values())))


class Loader:
    """Iterates over shuffled batches: for ever, or over `epochs` passes of which the last batch may be short.

    `state` is where the next batch starts: a new Loader with the same arguments and that state continues exactly.
    """

    def __init__(
        self,
        cache: Cache,
        hooks: str | Sequence[str] | None = None,
        *,
        batch_size: int,
        seed: int = 0,
        device: str | torch.device = "cpu",
        filters: Filters | None = None,
        part: Part = "train",
        holdout: Holdout | None = None,
        dtype: torch.dtype = torch.float32,
        state: LoaderState | None = None,
        epochs: int | None = None,
        pool_rows: int | None = None,
        block_rows: int | None = None,
        with_rows: bool = False,
        counts: Counts | None = None,
    ) -> None:
        self.hooks = resolve_hooks(cache, hooks)
        self.single = isinstance(hooks, str) or (hooks is None and len(self.hooks) == 1)
        self.batch_size, self.device, self.dtype, self.epochs = batch_size, torch.device(device), dtype, epochs
        filters, holdout = (filters or Filters()).resolve(cache), holdout or Holdout()
        self.counts = counts or account(cache, filters, holdout, self.hooks)
        self.n_rows = self.counts.of(part)
        _check_sizes(self.n_rows, batch_size, part, self.counts, endless=epochs is None)
        widths = {hook: cache.hook_points[hook].d_in for hook in self.hooks}
        self.order = plan_order(
            [(shard.index, shard.n_rows) for shard in cache.shards],
            bytes_per_row=sum(widths.values()) * (4 if cache.dtype == "float32" else 2),
            batch_size=batch_size,
            seed=seed,
            pool_rows=pool_rows,
            block_rows=block_rows,
        )
        self.state = state or LoaderState(seed)
        if self.state.seed != seed:
            raise SelectionError(f"the loader's state has seed {self.state.seed}, the loader was given seed {seed}")
        self._source = _Source(cache, self.hooks, self.order, Selection(filters, holdout, part), with_rows=with_rows)
        self._widths, self._storage = widths, cache.dtype
        self._pools: Prefetcher[_Pool] | None = None
        self._pool: _Pool | None = None
        self._taken = 0  # survivors of the current pool that were delivered
        self._finalizer: weakref.finalize[Any, Loader] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        pieces: list[tuple[dict[str, Tensor], NDArray[np.int64] | None]] = []
        missing = self.batch_size
        while missing and (pool := self._current_pool()) is not None:
            n = min(missing, pool.n_left(self._taken))
            if n:
                pieces.append(pool.select(self._taken, self._taken + n))
            self._taken, missing = self._taken + n, missing - n
            self._advance(pool)
        if not pieces:
            self.close()
            raise StopIteration
        rows = {hook: _join([p[0][hook] for p in pieces]).to(self.device, self.dtype) for hook in self.hooks}
        ids = [p[1] for p in pieces if p[1] is not None]
        row_ids = torch.from_numpy(np.concatenate(ids)) if ids else None
        return Batch(rows[self.hooks[0]] if self.single else rows, self.state, row_ids)

    def _current_pool(self) -> _Pool | None:
        """The pool to draw from, fetched if needed; None at the end of a finite loader."""
        if self._pool is None:
            if self._pools is None:
                self._start()
            assert self._pools is not None
            self._pool = next(self._pools, None)
            if self._pool is not None:
                self._pool.buffer.acquire(self._pool.index)
                cursor = self.state.cursor if self._pool.epoch == self.state.epoch else 0
                self._taken = int(np.searchsorted(self._pool.ranks, cursor - self._pool.start))
        return self._pool

    def _advance(self, pool: _Pool) -> None:
        """Update the state after a draw; give an emptied pool back."""
        if pool.n_left(self._taken):
            self.state = LoaderState(self.order.seed, pool.epoch, pool.start + int(pool.ranks[self._taken - 1]) + 1)
            return
        end = pool.start + pool.n_rows
        last = end == self.order.n_rows
        self.state = LoaderState(self.order.seed, pool.epoch + last, 0 if last else end)
        pool.buffer.release()
        pool.free.put(pool.buffer)
        self._pool = None

    def _start(self) -> None:
        free: queue.SimpleQueue[Buffer | None] = queue.SimpleQueue()
        n_buffers = 2 if self.order.n_pools > 1 or self.epochs != 1 else 1
        for _ in range(n_buffers):
            free.put(make_buffer(self.order, self._widths, self._storage, self.device))
        pools = self._source.pools(self.state, self.epochs, free, n_copy_threads(self.device))
        self._pools = Prefetcher(pools, stop=lambda: free.put(None))
        self._finalizer = weakref.finalize(self, self._pools.close)

    def close(self) -> None:
        """Stop the background thread and free the pools; the state stays, and iterating again continues from it."""
        if self._finalizer is not None:
            self._finalizer()
        self._finalizer = self._pools = self._pool = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Pool:
    """One assembled pool."""

    buffer: Buffer
    free: queue.SimpleQueue[Buffer | None]
    epoch: int
    start: int  # cursor at its first row
    n_rows: int
    index: Tensor  # (S,) survivors in the order of delivery, where the rows are
    order: NDArray[np.int64]  # (S,) the same on the CPU
    ranks: NDArray[np.int64]  # (S,) how many rows of the pool's order precede each survivor
    row_ids: NDArray[np.int64] | None  # (P,)

    def n_left(self, taken: int) -> int:
        """Survivors that were not delivered yet."""
        return len(self.ranks) - taken

    def select(self, lo: int, hi: int) -> tuple[dict[str, Tensor], NDArray[np.int64] | None]:
        """Survivors lo to hi: rows by hook point, and their ids if wanted."""
        index = self.index[lo:hi]
        rows = {hook: torch.index_select(rows, 0, index) for hook, rows in self.buffer.rows.items()}
        return rows, None if self.row_ids is None else self.row_ids[self.order[lo:hi]]


class _Source:
    """Assembles pools; runs in the background thread."""

    def __init__(
        self, cache: Cache, hooks: Sequence[str], order: Order, selection: Selection, *, with_rows: bool
    ) -> None:
        n_shards = len(cache.shards)
        self.order, self.selection = order, selection
        self.shards = {hook: [as_integers(cache.hook(hook).shard(i)) for i in range(n_shards)] for hook in hooks}
        columns = shard_columns(cache, selection, hooks)
        self.columns = {name: [shard[name] for shard in columns] for name in (columns[0] if columns else {})}
        self.first_row_ids = [shard.first_row_id for shard in cache.shards] if with_rows else None

    def pools(
        self, state: LoaderState, epochs: int | None, free: queue.SimpleQueue[Buffer | None], n_threads: int
    ) -> Iterator[_Pool]:
        """Pools from a state on; waits for a free buffer before each, ends when that is None."""
        epoch, pool = state.epoch, self.order.locate(state.epoch, state.cursor)
        with ThreadPoolExecutor(n_threads) if n_threads > 1 else nullcontext() as executor:
            while epochs is None or epoch < epochs:
                starts = self.order.pool_starts(epoch)
                for number in range(pool, self.order.n_pools):
                    buffer = free.get()
                    if buffer is None:
                        return
                    yield self._assemble(epoch, number, int(starts[number]), buffer, free, executor)
                epoch, pool = epoch + 1, 0

    def _assemble(
        self,
        epoch: int,
        number: int,
        start: int,
        buffer: Buffer,
        free: queue.SimpleQueue[Buffer | None],
        executor: Executor | None,
    ) -> _Pool:
        plan = self.order.pool(epoch, number)
        n_rows = plan.n_rows
        permutation = self.order.permutation(epoch, number, n_rows)
        keep = self.selection.mask({name: self._column(plan, shards) for name, shards in self.columns.items()})
        kept = keep[permutation]
        order, ranks = permutation[kept], np.flatnonzero(kept)
        needed, positions = plan.restrict(keep)
        buffer.fill(needed, self.shards, executor)
        row_ids = None if self.first_row_ids is None else plan.row_ids(self.first_row_ids)
        return _Pool(buffer, free, epoch, start, n_rows, buffer.index(positions[order]), order, ranks, row_ids)

    @staticmethod
    def _column(plan: PoolPlan, shards: Sequence[NDArray[Any]]) -> NDArray[Any]:
        out = np.empty(plan.n_rows, dtype=shards[0].dtype)
        plan.gather(shards, out)
        return out


def resolve_hooks(cache: Cache, hooks: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names of hook points of the cache; None means all of them."""
    names = tuple(cache.hook_points) if hooks is None else (hooks,) if isinstance(hooks, str) else tuple(hooks)
    for name in names:
        cache.hook(name)  # raises with the names that there are
    return names


def _check_sizes(n_rows: int, batch_size: int, part: Part, counts: Counts, *, endless: bool) -> None:
    if batch_size < 1:
        raise SelectionError(f"batch size is {batch_size}, expected at least 1")
    if endless and n_rows < batch_size:
        dropped = ", ".join(
            f"{name} {n:,}" for name, n in counts.to_json().items() if n and name not in ("total", part)
        )
        raise SelectionError(
            f"a batch of {batch_size:,} rows is larger than the {n_rows:,} {part} rows of the cache "
            f"(of {counts.total:,} rows: {dropped or 'none dropped'}); use a smaller batch or harvest more"
        )


def _join(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
