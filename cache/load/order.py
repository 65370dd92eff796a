"""The places of the rows of an epoch: blocks of the shards, gathered into pools in the order of `cache.load.shuffle`.

cursor   how many rows of the epoch's order were passed, filtered ones included; a pool covers a range of cursors
place    position of a block in the epoch's order; pool p covers places [p * pool_blocks, (p + 1) * pool_blocks)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sae_granary.cache.load import shuffle as permutations

I64 = NDArray[np.int64]
Copy = Callable[[], None]


@dataclass(frozen=True)
class Order:
    """The shape of a shuffled pass over pinned shards. Equal orders with equal seeds deliver equal rows."""

    shards: tuple[tuple[int, int], ...]  # (shard number, n_rows) of the pinned set
    block_rows: int
    pool_blocks: int
    seed: int

    @cached_property
    def n_rows(self) -> int:
        """Rows of one epoch, before any filter."""
        return sum(n for _, n in self.shards)

    @cached_property
    def first_blocks(self) -> I64:
        """(n_shards + 1,) number of the first block of each shard, then the number of blocks."""
        return np.concatenate([[0], np.cumsum(-(-self._lengths // self.block_rows))]).astype(np.int64)

    @cached_property
    def _lengths(self) -> I64:
        return np.array([n for _, n in self.shards], dtype=np.int64)

    @property
    def n_blocks(self) -> int:
        """Blocks of the cache, short ones included."""
        return int(self.first_blocks[-1])

    @property
    def n_pools(self) -> int:
        """Pools of one epoch."""
        return -(-self.n_blocks // self.pool_blocks)

    @property
    def max_pool_rows(self) -> int:
        """Rows that a pool can hold."""
        return min(self.pool_blocks * self.block_rows, self.n_rows)

    def pool_starts(self, epoch: int) -> I64:
        """(n_pools + 1,) cursor at which each pool starts. Only short blocks make this more than a multiplication."""
        starts = np.arange(self.n_pools + 1, dtype=np.int64) * (self.pool_blocks * self.block_rows)
        missing = -self._lengths % self.block_rows
        short = np.flatnonzero(missing)
        if short.size:
            blocks = self.first_blocks[short + 1] - 1
            pools = permutations.block_places(blocks, self.n_blocks, self.seed, epoch) // self.pool_blocks
            lost = np.bincount(pools, weights=missing[short], minlength=self.n_pools).astype(np.int64)
            starts[1:] -= np.cumsum(lost)
        starts[-1] = self.n_rows
        return starts

    def locate(self, epoch: int, cursor: int) -> int:
        """The pool that contains a cursor; n_pools at the end of the epoch."""
        return int(np.searchsorted(self.pool_starts(epoch), cursor, side="right")) - 1

    def pool(self, epoch: int, pool: int) -> PoolPlan:
        """The plan of a pool, in disk order."""
        start = pool * self.pool_blocks
        blocks = np.sort(permutations.block_order(self.n_blocks, self.seed, epoch, start, start + self.pool_blocks))
        of_block = np.searchsorted(self.first_blocks, blocks, side="right") - 1
        shards, starts = np.unique(of_block, return_index=True)
        blocks -= self.first_blocks[of_block]
        parts = [
            ShardPart(shard, blocks[lo:hi], self.shards[shard][1], self.block_rows)
            for shard, lo, hi in zip(shards.tolist(), starts.tolist(), [*starts[1:].tolist(), len(blocks)], strict=True)
        ]
        return PoolPlan(tuple(parts))

    def shards_at(self, epoch: int, cursor: int) -> tuple[I64, I64]:
        """Positions of the pinned shards that rows around a cursor come from, and of those that come after them."""
        every = np.arange(len(self.shards))
        return every, every

    def permutation(self, epoch: int, pool: int, n_rows: int) -> I64:
        """Order in which the rows of a pool are delivered."""
        return permutations.pool_permutation(n_rows, self.seed, epoch, pool)

    def to_json(self) -> dict[str, Any]:
        """JSON form, stored in checkpoints to refuse another order."""
        return {
            "format_version": permutations.FORMAT_VERSION,
            "shards": [list(s) for s in self.shards],
            "block_rows": self.block_rows,
            "pool_blocks": self.pool_blocks,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class ShardPart:
    """The blocks of one shard that a pool takes, ascending."""

    shard: int  # position among the pinned shards
    blocks: I64
    shard_rows: int
    block_rows: int

    @property
    def n_full(self) -> int:
        """How many of them are whole; the last of a shard may be short."""
        return len(self.blocks) - int(self.blocks[-1] == self.shard_rows // self.block_rows)

    @property
    def n_rows(self) -> int:
        """Rows of these blocks."""
        n_full = self.n_full
        return n_full * self.block_rows + (self.shard_rows % self.block_rows if n_full < len(self.blocks) else 0)

    def copies(self, rows: NDArray[Any], out: NDArray[Any], chunk_bytes: int) -> Iterator[Copy]:
        """Calls that copy these rows from a shard's array (shard_rows, ...) to out (n_rows, ...), in any order."""
        n_full, width = self.n_full, self.block_rows
        per_block = width * int(np.prod(rows.shape[1:]))
        whole = rows[: self.shard_rows // width * width].reshape(-1, per_block)
        target = out[: n_full * width].reshape(-1, per_block)
        step = max(chunk_bytes // max(whole[:1].nbytes, 1), 1)
        blocks = self.blocks[:n_full]
        for i in range(0, n_full, step):
            yield partial(_take, whole, blocks[i : i + step], target[i : i + step])
        if n_full < len(self.blocks):
            yield partial(np.copyto, out[n_full * width :], rows[self.shard_rows // width * width :])


class FileRows(Protocol):
    """Rows that are not in memory (`cache.load.readahead.ShardFiles`)."""

    def copies(self, plan: PoolPlan, out: NDArray[Any]) -> Iterator[Copy]:
        """Calls that read the rows of a plan to out (n_rows, ...), in any order."""


Stored = Sequence[NDArray[Any]] | FileRows  # the rows of an array: one in memory for each pinned shard, or files


def _take(source: NDArray[Any], indices: I64, out: NDArray[Any]) -> None:
    np.take(source, indices, axis=0, out=out, mode="clip")  # the other modes copy once more


def _one_by_one(copies: Sequence[Copy]) -> None:
    for copy in copies:
        copy()


@dataclass(frozen=True)
class PoolPlan:
    """The rows of a pool, in disk order."""

    parts: tuple[ShardPart, ...]

    @cached_property
    def n_rows(self) -> int:
        """Rows of the pool, before any filter."""
        return int(self.blocks[2].sum())

    @cached_property
    def blocks(self) -> tuple[I64, I64, I64]:
        """(n_blocks,) each: the shard of every block, its first row there, and its rows."""
        counts = [len(part.blocks) for part in self.parts]
        of_part = np.array([(part.shard, part.shard_rows, part.block_rows) for part in self.parts], dtype=np.int64)
        shards, lengths, widths = np.repeat(of_part.reshape(-1, 3), counts, axis=0).T
        firsts = np.concatenate([np.zeros(0, np.int64), *(part.blocks for part in self.parts)]) * widths
        return shards, firsts, np.minimum(lengths - firsts, widths)

    def runs(self, gap: int = 0) -> I64:
        """(n_runs, 3) shard, first row, and row after the last, of blocks with at most `gap` rows between them."""
        shards, firsts, sizes = self.blocks
        cuts = np.flatnonzero((np.diff(shards) != 0) | (firsts[1:] > (firsts + sizes)[:-1] + gap))
        begin, end = np.concatenate([[0], cuts + 1])[: len(shards)], np.append(cuts, len(shards) - 1)[: len(shards)]
        return np.stack([shards[begin], firsts[begin], firsts[end] + sizes[end]], axis=1)

    def gather(self, shards: Stored, out: NDArray[Any]) -> None:
        """Copy the pool's rows from the pinned shards to out (n_rows, ...)."""
        for copy in self.copies(shards, out, out.nbytes):
            copy()

    def copies(self, shards: Stored, out: NDArray[Any], chunk_bytes: int) -> Iterator[Copy]:
        """Calls that do what `gather` does, of about `chunk_bytes` each, in any order."""
        if not isinstance(shards, Sequence):
            yield from shards.copies(self, out)
            return
        done, small, n_bytes = 0, [], 0
        for part in self.parts:
            target = out[done : done + part.n_rows]
            done += part.n_rows
            if target.nbytes >= chunk_bytes:
                yield from part.copies(shards[part.shard], target, chunk_bytes)
                continue
            small += list(part.copies(shards[part.shard], target, chunk_bytes))
            n_bytes += target.nbytes
            if n_bytes >= chunk_bytes:
                yield partial(_one_by_one, small)
                small, n_bytes = [], 0
        yield partial(_one_by_one, small)

    def restrict(self, keep: NDArray[np.bool_]) -> tuple[PoolPlan, I64]:
        """The blocks that hold any of the rows to keep, and the place of each row of this plan among theirs."""
        sizes = self.blocks[2]
        used = np.logical_or.reduceat(keep, np.cumsum(sizes) - sizes)
        places = np.cumsum(np.repeat(used, sizes), dtype=np.int64) - 1
        if used.all():
            return self, places
        of_part = np.split(used, np.cumsum([len(part.blocks) for part in self.parts])[:-1])
        parts = [replace(part, blocks=part.blocks[u]) for part, u in zip(self.parts, of_part, strict=True) if u.any()]
        return PoolPlan(tuple(parts)), places

    def split(self, max_rows: int) -> Iterator[PoolPlan]:
        """The same rows in plans of at most max_rows, or of one block if a block is larger."""
        parts: list[ShardPart] = []
        n_rows = 0
        for part in self.parts:
            step = max(max_rows // part.block_rows, 1)
            for i in range(0, len(part.blocks), step):
                piece = replace(part, blocks=part.blocks[i : i + step])
                if parts and n_rows + piece.n_rows > max_rows:
                    yield PoolPlan(tuple(parts))
                    parts, n_rows = [], 0
                parts.append(piece)
                n_rows += piece.n_rows
        if parts:
            yield PoolPlan(tuple(parts))

    def row_ids(self, first_row_ids: Sequence[int]) -> I64:
        """(n_rows,) permanent ids, from the id of the first row of each pinned shard."""
        shards, firsts, sizes = self.blocks
        starts = np.array(first_row_ids, dtype=np.int64)[shards] + firsts
        return np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(self.n_rows)
