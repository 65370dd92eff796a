"""The order of the contexts of a pass: as harvested, or in a seeded permutation, found from the rows' positions alone.

The rows are cut into blocks of neighbors, of a permutation of `shuffle`; consecutive blocks of it are a pool,
and a second permutation orders the contexts that start in a pool. Memory: the contexts of one pool.

cursor   pool number times the rows that a pool can hold, plus the contexts of the pool that were passed
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sae_granary.cache.errors import SelectionError
from sae_granary.cache.load import shuffle
from sae_granary.cache.load.order import Order
from sae_granary.cache.load.selection import Selection, column_arrays

if TYPE_CHECKING:
    from sae_granary.cache.read.reader import Cache

BLOCK_ROWS = 1024
POOL_BLOCKS = 256  # 262,144 rows: a megabyte or so of context starts

I64 = NDArray[np.int64]


class ContextOrder:
    """The contexts with kept rows of the opened shards; `seed` None leaves them in harvest order."""

    def __init__(
        self, cache: Cache, hooks: Sequence[str], selection: Selection, seed: int | None,
        *, block_rows: int = BLOCK_ROWS, pool_blocks: int = POOL_BLOCKS,
    ) -> None:  # fmt: skip
        self._cache, self._selection, self._seed = cache, selection, seed
        shards = tuple((shard.index, shard.n_rows) for shard in cache.shards)
        self._order = Order(shards, block_rows, pool_blocks, seed or 0)
        self._position = cache.column("position")
        self._wanted = column_arrays(cache, selection, hooks)

    def contexts(self, epoch: int, cursor: int) -> Iterator[tuple[int, int, int, tuple[int, int]]]:
        """From a cursor to the end of the pass: opened shard, first row in it, row after it, next (epoch, cursor)."""
        stride, n_pools = self._order.pool_blocks * self._order.block_rows, self._order.n_pools
        first_pool, first = divmod(cursor, stride)
        for pool in range(first_pool, n_pools):
            table = self._pool(epoch, pool)
            behind = (epoch, (pool + 1) * stride) if pool + 1 < n_pools else (epoch + 1, 0)
            for i in range(first, len(table)):
                shard, start, end = table[i].tolist()
                yield shard, start, end, (epoch, pool * stride + i + 1) if i + 1 < len(table) else behind
            first = 0

    def keep(self, shard: int, start: int, end: int) -> NDArray[np.bool_]:
        """(end - start,) rows of an opened shard that the selection keeps."""
        return self._selection.mask({name: column.shard(shard)[start:end] for name, column in self._wanted.items()})

    def _pool(self, epoch: int, pool: int) -> I64:
        """(n, 3) shard, first row and row after the last of each context of a pool, in the order of delivery."""
        order, start = self._order, pool * self._order.pool_blocks
        stop = min(start + order.pool_blocks, order.n_blocks)
        if self._seed is None:
            blocks = np.arange(start, stop)
        else:
            blocks = np.sort(shuffle.block_order(order.n_blocks, self._seed, epoch, start, stop))
        shards = np.searchsorted(order.first_blocks, blocks, side="right") - 1
        table = np.concatenate([self._block(*pair) for pair in zip(shards.tolist(), blocks.tolist(), strict=True)])
        return table if self._seed is None else table[shuffle.pool_permutation(len(table), self._seed, epoch, pool)]

    def _block(self, shard: int, block: int) -> I64:
        """The contexts that start in a block and have kept rows."""
        position: NDArray[np.int32] = np.asarray(self._position.shard(shard))
        first = (block - int(self._order.first_blocks[shard])) * self._order.block_rows
        stop = min(first + self._order.block_rows, len(position))
        starts = first + np.flatnonzero(position[first:stop] == 0)
        if first == 0 and position[0] != 0:
            raise self._not_whole(shard)
        if not len(starts):
            return np.empty((0, 3), np.int64)
        ends = np.append(starts[1:], self._context_end(position, stop))
        rows = slice(int(starts[0]), int(ends[-1]))
        if (position[rows] != np.arange(rows.start, rows.stop) - np.repeat(starts, ends - starts)).any():
            raise self._not_whole(shard)
        kept = np.add.reduceat(self.keep(shard, rows.start, rows.stop), starts - rows.start, dtype=np.int64) > 0
        return np.stack([np.full(len(starts), shard), starts, ends], axis=1)[kept]

    def _context_end(self, position: NDArray[Any], row: int) -> int:
        """First row from `row` on where a context starts; the end of the shard if there is none."""
        while row < len(position):
            found = np.flatnonzero(position[row : row + self._order.block_rows] == 0)
            if len(found):
                return row + int(found[0])
            row += self._order.block_rows
        return len(position)

    def _not_whole(self, shard: int) -> SelectionError:
        return SelectionError(
            f"{self._cache.path}: shard {self._cache.shards[shard].index} does not hold whole contexts (positions "
            "that count up from 0): losses through the model need every token that it saw"
        )
