"""Shuffled batches of a cache on a device, prefetched, with a state of three integers.

A background thread plans pools (`cache.load.pools`): which rows, in the order of `shuffle`. Filtered and held-out rows
are stepped over: a batch is the next survivors, the cursor counts all rows. On a CPU other threads copy the rows of
the next batches straight from the memory maps. For a GPU the pool is copied to the device in disk order, through pinned
memory and a side stream, and batches are taken there; two pools exist at a time, so memory is O(pool).

Within a batch rows are in disk order: which rows meet in a batch is shuffled, their order in it means nothing.

Shapes: B batch rows, D = d_in.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sae_granary.cache.errors import SelectionError
from sae_granary.cache.load.batches import WHOLE, Batch, LoaderState, Share, deliver
from sae_granary.cache.load.order import Order
from sae_granary.cache.load.plan import Shuffle, plan_order
from sae_granary.cache.load.pools import PREVIOUS, PoolSource
from sae_granary.cache.load.selection import TRAIN_ROWS, Counts, Filters, Part, Selection, account

if TYPE_CHECKING:
    from sae_granary.cache.read.reader import Cache

__all__ = ["PREVIOUS", "WHOLE", "Batch", "Loader", "LoaderState", "Selection", "Share", "Shuffle"]

SHUFFLED = Shuffle()
COUNTED_ROWS = 2**24  # of a larger cache a loader does not count every row before its first batch


class Loader:
    """Iterates over shuffled batches: forever, or over `epochs` passes of which the last batch may be short.

    `state` is where the next batch starts: a new Loader with the same arguments and that state continues exactly.
    With `previous` a batch also holds the row before each row, under the hook point's name and "@-1"; contexts never
    cross shards, so it is in the same shard. A planned `Order` may be one of other hook points: one loader can
    deliver to several readers, each in the order that it has alone. With a `share` each batch holds that part of its
    rows; batches and states are those of the whole.
    """

    def __init__(
        self,
        cache: Cache,
        hooks: str | Sequence[str] | None = None,
        *,
        batch_size: int,
        order: Shuffle | Order = SHUFFLED,
        device: str | torch.device = "cpu",
        selection: Selection = TRAIN_ROWS,
        dtype: torch.dtype = torch.float32,
        state: LoaderState | None = None,
        epochs: int | None = None,
        with_rows: bool = False,
        previous: bool = False,
        counts: Counts | None = None,
        share: Share = WHOLE,
    ) -> None:
        self.hooks = resolve_hooks(cache, hooks)
        self.single = (isinstance(hooks, str) or (hooks is None and len(self.hooks) == 1)) and not previous
        self.batch_size, self.device, self.dtype, self.epochs = batch_size, torch.device(device), dtype, epochs
        if share.n > 1 and epochs is not None:
            raise SelectionError(f"epochs is {epochs}: parts of batches are for endless loaders, expected None")
        self._share = share
        selection = selection.resolve(cache)
        self._cache, self.selection = cache, selection
        if counts is None:  # of a large cache no more than tells whether there is a batch
            enough = None if cache.n_rows <= COUNTED_ROWS else batch_size
            counts = account(cache, selection, self.hooks, enough=enough)
        self._counts = counts
        if previous:
            _check_previous(selection.filters)
        _check_sizes(batch_size, selection.part, counts, endless=epochs is None)
        if isinstance(order, Shuffle):
            order = order_of(cache, self.hooks, order, batch_size=batch_size, previous=previous)
        self.order = order
        self.state = state = state or LoaderState(order.seed)
        if state.seed != order.seed:
            raise SelectionError(f"the loader's state has seed {state.seed}, the loader was given seed {order.seed}")
        self._source = PoolSource(
            cache,
            self.hooks,
            self.order,
            selection,
            self.device,
            keeps_all=counts.of(selection.part) == counts.total == cache.n_rows,
            with_rows=with_rows,
            previous=previous,
        )
        self._counted_hooks, self.hooks = self.hooks, tuple(self._source.hooks)
        self._batches: Generator[Batch, None, None] | None = None
        self._finalizer: weakref.finalize[Any, Loader] | None = None

    @property
    def counts(self) -> Counts:
        """Where every row of the cache goes; asking for it may take a pass over the columns of a large cache."""
        if self._counts.total < self._cache.n_rows:
            self._counts = account(self._cache, self.selection, self._counted_hooks)
        return self._counts

    @property
    def n_rows(self) -> int:
        """Rows that one epoch delivers; see `counts`."""
        return self.counts.of(self.selection.part)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._source.closed = False
            self._batches = deliver(self._source, self.state, self.batch_size, self.epochs, self._share)
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
        self._source.closed = True
        if self._finalizer is not None:
            self._finalizer()
        self._finalizer = self._batches = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def order_of(cache: Cache, hooks: Sequence[str], shuffle: Shuffle, *, batch_size: int, previous: bool = False) -> Order:
    """The order in which a loader of these hook points delivers the cache."""
    n_views, hooks = 2 if previous else 1, resolve_hooks(cache, hooks)
    return plan_order(
        [(shard.index, shard.n_rows - (n_views - 1)) for shard in cache.shards],
        shuffle,
        bytes_per_row=sum(cache.storage.row_bytes(cache.hook_points[h].d_in) for h in hooks) * n_views,
        batch_size=batch_size,
    )


def resolve_hooks(cache: Cache, hooks: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names of hook points of the cache; None means all of them but those that were added."""
    if hooks is None:
        hooks = [hook.name for hook in cache.manifest.hook_points]
    names = (hooks,) if isinstance(hooks, str) else tuple(hooks)
    for name in names:
        cache.hook(name)  # raises with the names that there are
    return names


def _check_previous(filters: Filters) -> None:
    if not filters.min_position or filters.min_position < 1:
        raise SelectionError(
            f"min_position is {filters.min_position}: rows with the one before them start at position 1 of a context"
        )


def _check_sizes(batch_size: int, part: Part, counts: Counts, *, endless: bool) -> None:
    n_rows = counts.of(part)
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
