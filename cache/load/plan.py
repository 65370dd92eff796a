"""From how rows are to be shuffled to an order: sizes of pools and blocks, and groups of shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from sae_granary.cache.load import shuffle as permutations
from sae_granary.cache.load.order import I64, Order, PoolPlan

MAX_PARTNERS = 0.1  # expected rows of a batch that share their block with a given row of it
MAX_BLOCK_ROWS = 64  # larger blocks copy no faster
POOL_BYTES = 512 * 2**20  # per buffer; a loader holds two


@dataclass(frozen=True)
class Shuffle:
    """How rows are to be shuffled; sizes of None are chosen so that a batch mixes well and pools fit the memory."""

    seed: int = 0
    pool_rows: int | None = None  # rows of a pool: what is shuffled, and held in memory, at once
    block_rows: int | None = None  # neighboring rows that stay in one pool
    shuffle_shards: int | None = None  # shards that a pool draws from at most; None: all


@dataclass(frozen=True)
class GroupedOrder(Order):
    """Shuffled shards in groups of at most `shuffle_shards`: one group after another, each shuffled by itself.

    The groups of an epoch are about equal, and others in each epoch; so is the number of pools (see `pool_starts`).
    """

    shuffle_shards: int

    @cached_property
    def _latest(self) -> dict[int, list[_Group]]:
        return {}

    def _groups(self, epoch: int) -> list[_Group]:
        """The groups of an epoch; those asked for last are kept."""
        if (known := self._latest.get(epoch)) is not None:
            return known
        groups, n_rows, n_pools = [], 0, 0
        shuffled = permutations.shard_order(len(self.shards), self.seed, epoch)
        for i, part in enumerate(np.array_split(shuffled, n_groups_of(len(self.shards), self.shuffle_shards))):
            shards = np.sort(part)
            pinned = tuple(self.shards[shard] for shard in shards.tolist())
            order = Order(pinned, self.block_rows, self.pool_blocks, permutations.group_seed(self.seed, i))
            groups.append(_Group(shards, order, n_rows, n_pools))
            n_rows, n_pools = n_rows + order.n_rows, n_pools + order.n_pools
        if len(self._latest) > 1:
            self._latest.clear()
        self._latest[epoch] = groups
        return groups

    def pool_starts(self, epoch: int) -> I64:
        """(n_pools + 1,) cursor at which each pool of the epoch starts, then its number of rows."""
        starts = [group.first_row + group.order.pool_starts(epoch)[:-1] for group in self._groups(epoch)]
        return np.concatenate([*starts, np.array([self.n_rows])])

    def pool(self, epoch: int, pool: int) -> PoolPlan:
        """The plan of a pool, in disk order."""
        group = next(group for group in reversed(self._groups(epoch)) if group.first_pool <= pool)
        parts = group.order.pool(epoch, pool - group.first_pool).parts
        return PoolPlan(tuple(replace(part, shard=int(group.shards[part.shard])) for part in parts))

    def shards_at(self, epoch: int, cursor: int) -> tuple[I64, I64]:
        """Positions of the pinned shards of the group of a cursor, and of the group that comes after it."""
        groups = self._groups(epoch)
        i = max(i for i, group in enumerate(groups) if group.first_row <= cursor)
        after = groups[i + 1] if i + 1 < len(groups) else self._groups(epoch + 1)[0]
        return groups[i].shards, after.shards

    def to_json(self) -> dict[str, Any]:
        """JSON form, which versions without groups refuse."""
        return {**super().to_json(), "shuffle_shards": self.shuffle_shards}


@dataclass(frozen=True, eq=False)
class _Group:
    """A group of shards in an epoch."""

    shards: I64  # their positions among the pinned ones, ascending
    order: Order  # of these alone
    first_row: int  # rows of the epoch before it
    first_pool: int  # pools of the epoch before it


def n_groups_of(n_shards: int, shuffle_shards: int | None) -> int:
    """How many groups the shards of an epoch are divided into."""
    return 1 if shuffle_shards is None else max(-(-n_shards // shuffle_shards), 1)


def plan_order(shards: Sequence[tuple[int, int]], shuffle: Shuffle, *, bytes_per_row: int, batch_size: int) -> Order:
    """Choose pool and block sizes: pools of about 512 MiB of equal size, blocks as large as the mixing allows."""
    n_groups, block_rows = n_groups_of(len(shards), shuffle.shuffle_shards), shuffle.block_rows
    n_shards = -(-len(shards) // n_groups)
    group = sorted((n for _, n in shards), reverse=True)[:n_shards]  # the largest that there can be
    n_rows = sum(group)
    wanted = shuffle.pool_rows or max(POOL_BYTES // max(bytes_per_row, 1), 4 * batch_size)
    n_pools = max(-(-n_rows // max(min(wanted, n_rows), 1)), 1)
    if block_rows is None:
        mixing = 1 + int(MAX_PARTNERS * (n_rows // n_pools - 1) / max(batch_size - 1, 1))
        block_rows = MAX_BLOCK_ROWS if n_pools == 1 else max(min(mixing, MAX_BLOCK_ROWS), 1)
    n_blocks = sum(-(-n // block_rows) for n in group)
    pinned, pool_blocks = tuple((i, n) for i, n in shards), max(-(-n_blocks // n_pools), 1)
    if n_groups == 1:
        return Order(pinned, block_rows, pool_blocks, shuffle.seed)
    assert shuffle.shuffle_shards is not None
    return GroupedOrder(pinned, block_rows, pool_blocks, shuffle.seed, shuffle.shuffle_shards)
