"""Planned pools: which rows of the cache, which of them survive, in which order; made in a background thread.

A row's address says where it is copied from: on a CPU its place among all rows of the pinned shards, on a GPU its
place in the buffer of the pool. Both ascend in disk order. Shapes: S surviving rows of a pool.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_granary.cache.errors import SelectionError
from sae_granary.cache.load.decode import Decoder, as_integers, stored_arrays, stored_names
from sae_granary.cache.load.order import Order, PoolPlan, Stored
from sae_granary.cache.load.readahead import ShardFiles, read_ahead
from sae_granary.cache.load.selection import Selection, column_arrays
from sae_granary.cache.load.staging import DeviceBuffer, HostRows, PoolRows, is_staged, n_copy_threads
from sae_granary.common.process import most_maps
from sae_granary.common.threads import THREADS, Prefetch

if TYPE_CHECKING:
    from sae_granary.cache.read.arrays import RowArray
    from sae_granary.cache.read.reader import Cache

I64 = NDArray[np.int64]
PREVIOUS = "@-1"  # after a hook point's name: the row before each row

Taken = tuple[dict[str, Tensor], I64 | None]  # rows by hook point, their ids if wanted


@dataclass(frozen=True)
class PlannedPool:
    """Which rows a pool has, and which of them are delivered when."""

    plan: PoolPlan  # in disk order; on a GPU without the blocks of which no row survives
    epoch: int
    start: int  # cursor at its first row
    n_rows: int  # before any filter
    order: I64  # (S,) addresses of the survivors in the order of delivery, ascending within each batch
    ranks: I64 | None  # (S,) how many rows of the pool's order precede each survivor; None: all rows survive

    def survivors_before(self, cursor: int) -> int:
        """How many survivors precede a cursor of this epoch."""
        passed = min(max(cursor - self.start, 0), self.n_rows)
        return passed if self.ranks is None else int(np.searchsorted(self.ranks, passed))

    def cursor_after(self, n_survivors: int) -> int:
        """The cursor after the first n survivors."""
        passed = n_survivors if self.ranks is None else int(self.ranks[n_survivors - 1]) + 1
        return self.start + passed


@dataclass(frozen=True)
class Pool(PlannedPool):
    """A planned pool whose rows can be taken."""

    rows: PoolRows
    row_ids: Callable[[I64], I64] | None  # addresses -> permanent ids


class PoolSource:
    """Plans pools and takes rows from them; runs in the background threads.

    With `keeps_all` no row of the cache is filtered or held out, and no column is read.
    """

    def __init__(
        self,
        cache: Cache,
        hooks: Sequence[str],
        order: Order,
        selection: Selection,
        device: torch.device,
        *,
        keeps_all: bool,
        with_rows: bool,
        previous: bool,
    ) -> None:
        self.order, self.selection, self.device = order, selection, device
        self._rows_device = device if device.type == "cuda" else torch.device("cpu")  # where a batch is taken
        skipped = int(previous)  # the first row of a shard has no row before it
        self.decoders = {hook: Decoder(cache.hook(hook), hook) for hook in hooks}
        stored = {name: (a, slice(skipped, None)) for h in hooks for name, a in stored_arrays(cache.hook(h), h).items()}
        if previous:
            self.decoders |= {hook + PREVIOUS: Decoder(cache.hook(hook), hook + PREVIOUS) for hook in hooks}
            before = [stored_arrays(cache.hook(hook), hook + PREVIOUS) for hook in hooks]
            stored |= {name: (array, slice(0, -1)) for arrays in before for name, array in arrays.items()}
        self.hooks = tuple(self.decoders)
        self.kinds = stored_names(self.hooks, cache.storage)
        self._columns = {} if keeps_all else column_arrays(cache, selection, hooks)
        arrays = {id(array) for array in (*(array for array, _ in stored.values()), *self._columns.values())}
        self._many = many = cache.fetcher is not None or len(arrays) * len(cache.shards) > most_maps()
        self.staged = many or is_staged(device)
        self._widths = {name: array.layout.width or 1 for name, (array, _) in stored.items()}
        mapped = {} if many else {name: _mapped(array, part) for name, (array, part) in stored.items()}
        files = {name: ShardFiles(array, part.start) for name, (array, part) in stored.items()}
        self.shards: Mapping[str, Stored] = files if many else mapped
        self.columns: Mapping[str, Stored] = {
            name: ShardFiles(array, skipped) if many else [array.shard(i)[skipped:] for i in range(array.n_shards)]
            for name, array in self._columns.items()
        }
        self._reading, self.closed = partial(cache.reading, hooks), False
        self._files = [cache.hook(hook).stored for hook in hooks]
        self.first_row_ids = [shard.first_row_id + skipped for shard in cache.shards] if with_rows else None
        self._host = None if self.staged else HostRows(mapped, [n for _, n in order.shards], self.kinds)

    def pools(self, epoch: int, cursor: int, epochs: int | None, batch_size: int) -> Generator[Pool, None, None]:
        """Pools from a cursor on, at which a batch starts.

        The rows of a pool may be overwritten when the next but one is asked for. Raises SelectionError when an epoch
        of an endless stream has no survivor: its reader would wait forever.
        """
        planned = self._plans(epoch, cursor, epochs, batch_size)
        if (host := self._host) is not None:
            yield from (self._in_memory(plan, host) for plan in planned)
            return
        buffers = [DeviceBuffer(self.order, self._widths, self.kinds, self.device) for _ in range(2)]
        # The next pool is planned while this one is copied: both take about as long.
        with (
            ThreadPoolExecutor(n_copy_threads(self.device), thread_name_prefix=THREADS + "stage") as executor,
            closing(Prefetch(planned, depth=1)) as plans,
            self._reading(lambda: self.closed) as enter,
        ):
            for plan in plans:
                enter(*self.order.shards_at(plan.epoch, plan.start))
                yield self._staged(plan, buffers[0], executor)
                buffers.reverse()

    def _plans(
        self, epoch: int, cursor: int, epochs: int | None, batch_size: int
    ) -> Generator[PlannedPool, None, None]:
        """What `pools` delivers, before any row is read."""
        first, missing = self.order.locate(epoch, cursor), 0
        while epochs is None or epoch < epochs:
            starts, whole, n_survivors = self.order.pool_starts(epoch), first == 0, 0
            for number in range(first, len(starts) - 1):
                plan = self._plan(epoch, number, int(starts[number]))
                missing = sort_batches(plan.order[plan.survivors_before(cursor) :], batch_size, missing)
                n_survivors += len(plan.order)
                yield plan
            if epochs is None and whole and not n_survivors:
                raise SelectionError(
                    f"none of the {self.order.n_rows:,} rows passes the filters, although some did when they were "
                    "counted: the filters have changed since; give those of that time"
                )
            epoch, first, cursor = epoch + 1, 0, 0

    def _plan(self, epoch: int, number: int, start: int) -> PlannedPool:
        plan = self.order.pool(epoch, number)
        order = self.order.permutation(epoch, number, plan.n_rows)
        keep, ranks, n_rows = None, None, plan.n_rows
        if self.columns:
            if not self._many:
                read_ahead(self._columns.values(), plan)
            keep = self.selection.mask({name: self._column(plan, name) for name in self.columns})
            kept = keep[order]
            order, ranks = order[kept], np.flatnonzero(kept)
        if self._host is not None:
            order = plan.row_ids(self._host.starts.tolist())[order]
        elif keep is not None:
            plan, places = plan.restrict(keep)
            order = places[order]
        if not self._many:
            read_ahead(self._files, plan)
        return PlannedPool(plan, epoch, start, n_rows, order, ranks)

    def _column(self, plan: PoolPlan, name: str) -> NDArray[Any]:
        out = np.empty(plan.n_rows, dtype=self._columns[name].dtype)
        plan.gather(self.columns[name], out)
        return out

    def _in_memory(self, planned: PlannedPool, host: HostRows) -> Pool:
        row_ids = None if self.first_row_ids is None else partial(self._ids_of_addresses, host)
        return Pool(**vars(planned), rows=host, row_ids=row_ids)

    def _staged(self, planned: PlannedPool, buffer: DeviceBuffer, executor: Executor) -> Pool:
        buffer.fill(planned.plan, planned.order, self.shards, executor)
        ids = None if self.first_row_ids is None else planned.plan.row_ids(self.first_row_ids)
        return Pool(**vars(planned), rows=buffer, row_ids=None if ids is None else ids.__getitem__)

    def take(self, pool: Pool, lo: int, hi: int) -> Callable[[], Taken]:
        """Survivors lo to hi of a pool, of one batch, after the returned function was called (see `PoolRows.take`)."""
        copies = {name: pool.rows.take(name, pool.order, lo, hi) for name in self.shards}
        memory = {hook: decoder.memory(hi - lo, self._rows_device) for hook, decoder in self.decoders.items()}

        def finish() -> Taken:
            ids = None if pool.row_ids is None else pool.row_ids(pool.order[lo:hi])
            taken = {name: copied() for name, copied in copies.items()}
            return {hook: decoder(taken, memory[hook]) for hook, decoder in self.decoders.items()}, ids

        return finish

    def _ids_of_addresses(self, host: HostRows, index: I64) -> I64:
        assert self.first_row_ids is not None
        shard = host.shard_of(index)
        return index + (np.array(self.first_row_ids, dtype=np.int64) - host.starts)[shard]


def sort_batches(order: I64, batch_size: int, missing: int) -> int:
    """Sort in place what each batch takes of `order`, of which the open one takes `missing`; what is missing after."""
    order[:missing].sort()
    if len(order) <= missing:
        return missing - len(order)
    rest = order[missing:]
    n_whole = len(rest) // batch_size * batch_size
    rest[:n_whole].reshape(-1, batch_size).sort(axis=1)
    rest[n_whole:].sort()
    return (n_whole - len(rest)) % batch_size


def _mapped(array: RowArray, part: slice) -> Sequence[NDArray[Any]]:
    return [as_integers(array.shard(i), array.layout.storage)[part] for i in range(array.n_shards)]
