"""Shuffled batches of a cache on a device, prefetched, with a state of three integers.

A background thread plans pools (`cache.order`): which rows, in the order of `cache.shuffle`. Filtered and held-out rows
are stepped over: a batch is the next survivors, the cursor counts all rows. On a CPU another thread copies the rows of
the next batches straight from the memory maps. For a GPU the pool is copied to the device in disk order, through pinned
memory and a side stream, and batches are taken there; two pools exist at a time, so memory is O(pool).

Within a batch rows stand in disk order: which rows meet in a batch is shuffled, their order in it means nothing.

Shapes: B batch rows, D = d_in, P rows of a pool, S surviving rows of a pool.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.errors import SelectionError
from cache.order import Order, PoolPlan, plan_order
from cache.prefetch import Prefetcher
from cache.readahead import ReadAhead
from cache.selection import Counts, Filters, Holdout, Part, Selection, account, shard_columns
from cache.staging import CudaBuffer, HostRows, PoolRows, as_integers, as_tensor, n_copy_threads

if TYPE_CHECKING:
    from cache.reader import Cache

BATCHES_AHEAD = 4

__all__ = ["Batch", "Counts", "Filters", "Holdout", "Loader", "LoaderState"]


PREVIOUS = "@-1"  # after a hook point's name: the row before each row


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
    With `previous` a batch also holds the row before each row, under the hook point's name and "@-1"; windows never
    cross shards, so it lies in the same shard. An `order` given replaces the one that would be planned for these hook
    points: one loader can deliver to several readers, each in the order that it has alone.
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
        previous: bool = False,
        counts: Counts | None = None,
        order: Order | None = None,
    ) -> None:
        self.hooks = resolve_hooks(cache, hooks)
        self.single = (isinstance(hooks, str) or (hooks is None and len(self.hooks) == 1)) and not previous
        self.batch_size, self.device, self.dtype, self.epochs = batch_size, torch.device(device), dtype, epochs
        filters, holdout = (filters or Filters()).resolve(cache), holdout or Holdout()
        self.counts = counts or account(cache, filters, holdout, self.hooks)
        self.n_rows = self.counts.of(part)
        if previous:
            _check_previous(filters)
        _check_sizes(self.n_rows, batch_size, part, self.counts, endless=epochs is None)
        self.order = order or order_of(
            cache,
            self.hooks,
            batch_size=batch_size,
            seed=seed,
            pool_rows=pool_rows,
            block_rows=block_rows,
            previous=previous,
        )
        self.state = state or LoaderState(seed)
        if self.state.seed != seed:
            raise SelectionError(f"the loader's state has seed {self.state.seed}, the loader was given seed {seed}")
        selection = Selection(filters, holdout, part)
        self._source = _Source(
            cache, self.hooks, self.order, selection, self.device, with_rows=with_rows, previous=previous
        )
        self.hooks = tuple(self._source.hooks)
        self._batches: Prefetcher[Batch] | Generator[Batch, None, None] | None = None
        self._finalizer: weakref.finalize[Any, Loader] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            batches = _batches(self._source, self.state, self.batch_size, self.epochs)
            # On a GPU taking a batch is a launch on the consumer's stream: nothing to gain from a thread.
            self._batches = batches if self.device.type == "cuda" else Prefetcher(batches, BATCHES_AHEAD)
            self._finalizer = weakref.finalize(self, self._batches.close)
        try:
            drawn = next(self._batches)
        except BaseException:
            self.close()
            raise
        self.state = drawn.state
        assert isinstance(drawn.x, dict)
        rows = {hook: x.to(self.device, self.dtype) for hook, x in drawn.x.items()}
        return Batch(rows[self.hooks[0]] if self.single else rows, drawn.state, drawn.row_ids)

    def close(self) -> None:
        """Stop the background threads; the state stays, and iterating again continues from it."""
        if self._finalizer is not None:
            self._finalizer()
        self._finalizer = self._batches = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Pool:
    """One pool: its rows, and which of them are delivered when."""

    rows: PoolRows
    epoch: int
    start: int  # cursor at its first row
    n_rows: int
    order: NDArray[np.int64]  # (S,) survivors in the order of delivery, counted in disk order
    ranks: NDArray[np.int64]  # (S,) how many rows of the pool's order precede each survivor
    needed: NDArray[np.int64]  # (P,) where each row stands among the rows that were fetched
    row_ids: NDArray[np.int64] | None  # (P,)


def _batches(source: _Source, state: LoaderState, batch_size: int, epochs: int | None) -> Generator[Batch, None, None]:
    """Batches from a state on, in the storage dtype, by hook point."""
    seed, n_rows = source.order.seed, source.order.n_rows
    executor = ThreadPoolExecutor(source.n_threads, thread_name_prefix="cache-copy")
    pools = Prefetcher(source.pools(state, epochs, executor), depth=1)
    pool: _Pool | None = None
    taken = 0  # survivors of the pool that were delivered
    try:
        while True:
            pieces: list[tuple[dict[str, Tensor], NDArray[np.int64] | None]] = []
            missing = batch_size
            while missing:
                if pool is None:
                    pool = next(pools, None)
                    if pool is None:
                        break
                    cursor = state.cursor if pool.epoch == state.epoch else 0
                    taken = int(np.searchsorted(pool.ranks, cursor - pool.start))
                n = min(missing, len(pool.ranks) - taken)
                if n:
                    pieces.append(source.take(pool, taken, taken + n))
                taken, missing = taken + n, missing - n
                if taken < len(pool.ranks):
                    state = LoaderState(seed, pool.epoch, pool.start + int(pool.ranks[taken - 1]) + 1)
                    continue
                end = pool.start + pool.n_rows
                state = LoaderState(seed, pool.epoch + (end == n_rows), 0 if end == n_rows else end)
                pool.rows.release()
                pool = None
            if not pieces:
                return
            rows = {hook: _join([p[0][hook] for p in pieces]) for hook in source.hooks}
            ids = [p[1] for p in pieces if p[1] is not None]
            yield Batch(rows, state, torch.from_numpy(np.concatenate(ids)) if ids else None)
    finally:
        pools.close()
        executor.shutdown()


class _Source:
    """Plans pools and takes rows from them; runs in the background threads."""

    def __init__(
        self,
        cache: Cache,
        hooks: Sequence[str],
        order: Order,
        selection: Selection,
        device: torch.device,
        *,
        with_rows: bool,
        previous: bool,
    ) -> None:
        self.order, self.selection, self.device = order, selection, device
        self.dtype, self.n_threads = cache.dtype, n_copy_threads(device)
        skipped = int(previous)  # the first row of a shard has no row before it
        numbers = range(len(cache.shards))
        shards = {hook: [as_integers(cache.hook(hook).shard(i)) for i in numbers] for hook in hooks}
        self.shards = {hook: [rows[skipped:] for rows in shards[hook]] for hook in hooks}
        if previous:
            self.shards |= {hook + PREVIOUS: [rows[:-1] for rows in shards[hook]] for hook in hooks}
        self.hooks = tuple(self.shards)
        self.maps = {hook: [as_tensor(rows) for rows in views] for hook, views in self.shards.items()}
        columns = shard_columns(cache, selection, hooks)
        self.columns = {name: [shard[name][skipped:] for shard in columns] for name in (columns[0] if columns else {})}
        self.first_row_ids = [shard.first_row_id + skipped for shard in cache.shards] if with_rows else None
        self.files = [
            [(cache.shard_path(hook, i), rows.strides[0]) for i, rows in enumerate(shards[hook])] for hook in hooks
        ]

    def pools(self, state: LoaderState, epochs: int | None, executor: Executor) -> Generator[_Pool, None, None]:
        """Pools from a state on. The rows of a pool may be overwritten when the next but one is asked for."""
        epoch, first = state.epoch, self.order.locate(state.epoch, state.cursor)
        ahead = ReadAhead(self.files)
        buffers: list[CudaBuffer | None] = [None, None]
        if self.device.type == "cuda":
            widths = {hook: shards[0].shape[1] for hook, shards in self.shards.items()}
            buffers = [CudaBuffer(self.order, widths, self.dtype, self.device) for _ in buffers]
        while epochs is None or epoch < epochs:
            starts = self.order.pool_starts(epoch)
            for number in range(first, self.order.n_pools):
                yield self._assemble(epoch, number, int(starts[number]), buffers[0], ahead, executor)
                buffers.reverse()
            epoch, first = epoch + 1, 0

    def _assemble(
        self,
        epoch: int,
        number: int,
        start: int,
        buffer: CudaBuffer | None,
        ahead: ReadAhead,
        executor: Executor,
    ) -> _Pool:
        plan = self.order.pool(epoch, number)
        permutation = self.order.permutation(epoch, number, plan.n_rows)
        keep = self.selection.mask({name: self._column(plan, shards) for name, shards in self.columns.items()})
        kept = keep[permutation]
        fetched, positions = plan.restrict(keep)
        ahead.advise(fetched)
        rows: PoolRows
        if buffer is not None:
            buffer.fill(fetched, self.shards, executor)
            rows = buffer
        else:
            rows = HostRows(fetched, self.maps, self.dtype, executor, self.n_threads)
        row_ids = None if self.first_row_ids is None else plan.row_ids(self.first_row_ids)
        order, ranks = permutation[kept], np.flatnonzero(kept)
        return _Pool(rows, epoch, start, plan.n_rows, order, ranks, positions, row_ids)

    def take(self, pool: _Pool, lo: int, hi: int) -> tuple[dict[str, Tensor], NDArray[np.int64] | None]:
        """Survivors lo to hi of a pool: rows by hook point, and their ids if wanted."""
        index = np.sort(pool.order[lo:hi])
        fetched = pool.needed[index]
        rows = {hook: pool.rows.take(hook, fetched) for hook in self.hooks}
        return rows, None if pool.row_ids is None else pool.row_ids[index]

    @staticmethod
    def _column(plan: PoolPlan, shards: Sequence[NDArray[Any]]) -> NDArray[Any]:
        out = np.empty(plan.n_rows, dtype=shards[0].dtype)
        plan.gather(shards, out)
        return out


def order_of(
    cache: Cache,
    hooks: Sequence[str],
    *,
    batch_size: int,
    seed: int,
    pool_rows: int | None = None,
    block_rows: int | None = None,
    previous: bool = False,
) -> Order:
    """The order in which a loader of these hook points delivers the cache."""
    n_views = 2 if previous else 1
    return plan_order(
        [(shard.index, shard.n_rows - (n_views - 1)) for shard in cache.shards],
        bytes_per_row=sum(cache.hook_points[h].d_in for h in hooks) * n_views * (4 if cache.dtype == "float32" else 2),
        batch_size=batch_size,
        seed=seed,
        pool_rows=pool_rows,
        block_rows=block_rows,
    )


def resolve_hooks(cache: Cache, hooks: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names of hook points of the cache; None means all of them."""
    names = tuple(cache.hook_points) if hooks is None else (hooks,) if isinstance(hooks, str) else tuple(hooks)
    for name in names:
        cache.hook(name)  # raises with the names that there are
    return names


def _check_previous(filters: Filters) -> None:
    if not filters.min_position or filters.min_position < 1:
        raise SelectionError(
            f"min_position is {filters.min_position}: rows with the one before them start at position 1 of a window"
        )


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
