"""The order of an epoch: permutations for any size, seed and epoch, the same forever."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_granary.cache.load import shuffle
from sae_granary.cache.load.order import Order
from sae_granary.cache.load.plan import GroupedOrder, Shuffle, plan_order

sizes = st.integers(0, 3000)
seeds = st.integers(0, 2**40)
epochs = st.integers(0, 50)


@given(sizes, seeds, epochs)
@settings(max_examples=60, deadline=None)
def test_block_order_is_a_permutation_and_has_an_inverse(n: int, seed: int, epoch: int) -> None:
    order = shuffle.block_order(n, seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(n))
    assert np.array_equal(shuffle.block_places(order, n, seed, epoch), np.arange(n))


@given(sizes, seeds, epochs)
@settings(max_examples=40, deadline=None)
def test_pool_permutation_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(shuffle.pool_permutation(n, seed, epoch, 3)), np.arange(n))


def test_block_order_can_be_taken_in_slices() -> None:
    whole = shuffle.block_order(5000, seed=3, epoch=2)
    parts = [shuffle.block_order(5000, 3, 2, start, start + 700) for start in range(0, 5000, 700)]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("n", [3, 17, 1000, 5000, 300_001])
def test_an_order_is_the_same_taken_whole_or_one_by_one(n: int) -> None:
    whole = shuffle.block_order(n, seed=1, epoch=4)
    for place in [0, 1, n // 3, n - 1]:
        assert shuffle.block_order(n, 1, 4, place, place + 1) == whole[place]


# Frozen: a change here changes the rows that a resumed run would see, and needs another shuffle.FORMAT_VERSION.
def test_orders_never_change() -> None:
    assert shuffle.FORMAT_VERSION == 1
    assert shuffle.block_order(10, 0, 0).tolist() == [5, 3, 8, 6, 9, 4, 2, 7, 0, 1]
    assert shuffle.block_order(10, 1, 0).tolist() == [0, 1, 7, 3, 8, 4, 2, 9, 5, 6]
    assert shuffle.block_order(1000, 7, 3, 10, 20).tolist() == [17, 353, 911, 738, 515, 890, 638, 37, 154, 528]
    assert shuffle.pool_permutation(10, 0, 0, 0).tolist() == [5, 9, 2, 4, 3, 7, 6, 0, 1, 8]
    assert shuffle.pool_permutation(10, 0, 0, 1).tolist() == [9, 3, 2, 1, 4, 5, 8, 6, 7, 0]
    assert shuffle.hash64(np.arange(3), 5).tolist() == [
        13168350753275463132,
        7134611160154358618,
        13877614986023876344,
    ]


@pytest.mark.parametrize(
    "permute", [lambda s: shuffle.block_order(4, s, 0), lambda s: shuffle.pool_permutation(4, s, 0, 0)]
)
def test_every_permutation_is_equally_likely(permute) -> None:
    counts = Counter(tuple(permute(seed)) for seed in range(4800))
    assert len(counts) == 24
    chi_square = sum((c - 200) ** 2 / 200 for c in counts.values())
    assert chi_square < 60  # 23 degrees of freedom: the mean is 23, 60 has p = 3e-5; the seeds are fixed


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=6),
    st.integers(1, 40),
    st.integers(1, 30),
    seeds,
    st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_pools_hold_every_row_once(rows: list[int], block_rows: int, pool_blocks: int, seed: int, epoch: int) -> None:
    order = Order(tuple(enumerate(rows)), block_rows, pool_blocks, seed)
    first_ids = [1000 * i for i in range(len(rows))]
    starts = order.pool_starts(epoch)
    ids = []
    for pool in range(order.n_pools):
        plan = order.pool(epoch, pool)
        assert plan.n_rows == starts[pool + 1] - starts[pool]
        assert plan.n_rows <= order.max_pool_rows
        assert order.locate(epoch, int(starts[pool])) == pool
        assert order.locate(epoch, int(starts[pool + 1]) - 1) == pool
        ids.append(plan.row_ids(first_ids))
    assert starts[-1] == sum(rows)
    expected = np.concatenate([np.arange(n) + first for n, first in zip(rows, first_ids, strict=True)])
    assert np.array_equal(np.sort(np.concatenate(ids)), expected)


@given(
    st.lists(st.integers(1, 200), min_size=2, max_size=9),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 12),
    seeds,
    st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_groups_of_shards_hold_every_row_once_and_follow_one_another(
    rows: list[int], shuffle_shards: int, block_rows: int, pool_blocks: int, seed: int, epoch: int
) -> None:
    order = GroupedOrder(tuple(enumerate(rows)), block_rows, pool_blocks, seed, shuffle_shards)
    starts, first_ids = order.pool_starts(epoch), [1000 * i for i in range(len(rows))]
    ids, groups, following = [], [], []
    for pool in range(len(starts) - 1):
        plan, (now, after) = order.pool(epoch, pool), order.shards_at(epoch, int(starts[pool]))
        assert 0 < plan.n_rows == starts[pool + 1] - starts[pool] <= order.max_pool_rows
        assert order.locate(epoch, int(starts[pool + 1]) - 1) == pool
        used = [part.shard for part in plan.parts]
        assert used == sorted(used)
        assert set(used) <= set(now.tolist())
        assert len(now) <= shuffle_shards
        if not groups or groups[-1] != now.tolist():
            assert not groups or following == now.tolist()
            groups.append(now.tolist())
            following = after.tolist()
        ids.append(plan.row_ids(first_ids))
    assert following == order.shards_at(epoch + 1, 0)[0].tolist()
    assert sorted(shard for group in groups for shard in group) == list(range(len(rows)))
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    expected = np.concatenate([np.arange(n) + first for n, first in zip(rows, first_ids, strict=True)])
    assert np.array_equal(np.sort(np.concatenate(ids)), expected)


def test_the_order_of_groups_stays_the_same_forever() -> None:
    order = GroupedOrder(((0, 7), (1, 7), (4, 3), (5, 7), (9, 5)), 4, 2, seed=3, shuffle_shards=2)
    read = [order.pool(1, pool).row_ids([0, 100, 400, 500, 900]) for pool in range(len(order.pool_starts(1)) - 1)]
    assert [order.shards_at(1, cursor)[0].tolist() for cursor in (0, 14, 28)] == [[0, 2], [1, 4], [3]]
    assert [ids.tolist() for ids in read] == [
        [4, 5, 6, 400, 401, 402],
        [0, 1, 2, 3],
        [104, 105, 106, 900, 901, 902, 903],
        [100, 101, 102, 103, 904],
        [500, 501, 502, 503, 504, 505, 506],
    ]


def test_groups_of_all_shards_are_the_order_without_groups() -> None:
    shards = [(i, 1000) for i in range(8)]
    plain, whole, halves = (
        plan_order(shards, Shuffle(2, shuffle_shards=n), bytes_per_row=4, batch_size=64) for n in (None, 8, 4)
    )
    assert whole == plain
    assert whole.to_json() == plain.to_json()
    assert set(plain.to_json()) == {"format_version", "shards", "block_rows", "pool_blocks", "seed"}
    assert halves.to_json()["shuffle_shards"] == 4
    assert len(halves.pool_starts(0)) - 1 == 2  # a pool for each group, of its size
    assert halves.max_pool_rows == 64 * 64  # blocks of 64 rows, 16 of each shard
    firsts = [halves.shards_at(epoch, 0)[0].tolist() for epoch in range(6)]
    assert len(set(map(tuple, firsts))) > 1


def test_gather_copies_the_rows_that_it_names() -> None:
    order = Order(((0, 101), (5, 64), (6, 7)), block_rows=8, pool_blocks=9, seed=1)
    rng = np.random.default_rng(0)
    shards = [rng.integers(0, 1000, (n, 3)) for _, n in order.shards]
    starts = [0, 101, 165]
    stacked = np.concatenate(shards)
    for pool in range(order.n_pools):
        plan = order.pool(0, pool)
        out = np.empty((plan.n_rows, 3), dtype=np.int64)
        plan.gather(shards, out)
        assert np.array_equal(out, stacked[plan.row_ids(starts)])
        keep = rng.random(plan.n_rows) < 0.05
        smaller, positions = plan.restrict(keep)
        part = np.empty((smaller.n_rows, 3), dtype=np.int64)
        smaller.gather(shards, part)
        assert np.array_equal(part[positions[keep]], out[keep])
        pieces = [piece.row_ids(starts) for piece in plan.split(20)]
        assert all(len(p) <= 20 for p in pieces)
        assert np.array_equal(np.concatenate(pieces), plan.row_ids(starts))


def test_planned_blocks_keep_partners_rare() -> None:
    order = plan_order([(0, 1_000_000)], Shuffle(pool_rows=125_000), bytes_per_row=1536, batch_size=4096)
    pool = order.pool_blocks * order.block_rows
    assert (order.block_rows - 1) * (4096 - 1) / (pool - 1) <= 0.1
    assert order.n_pools == 8
    assert plan_order([(0, 1000)], Shuffle(), bytes_per_row=1536, batch_size=64).n_pools == 1


def test_order_is_uniform_over_the_cache() -> None:
    # Where the rows of a batch come from: the share of the first tenth of the cache is binomial.
    order = plan_order([(0, 50_000)], Shuffle(pool_rows=10_000), bytes_per_row=4, batch_size=1000)
    plan = order.pool(0, 0)
    share = (plan.row_ids([0]) < 5000).mean()
    assert abs(share - 0.1) < 0.02
