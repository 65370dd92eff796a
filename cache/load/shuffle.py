"""Epoch order as pure functions of (shape of the cache, seed, epoch).

The permutations are our own specified algorithms in integer arithmetic modulo 2**64: the random streams of numpy and
torch may change between versions, and an order that changes cannot be resumed. Part of the format: `FORMAT_VERSION`.

Two levels:

    blocks   the rows of each shard are cut into blocks of `block_rows` neighbors (the last of a shard may be short);
             `block_order` permutes all blocks of the cache, lazily, so that no list as long as the cache is ever built
    rows     consecutive blocks of that order fill a pool, and `pool_permutation` permutes the rows inside it

With `cache.load.plan.GroupedOrder` a third is above them: `shard_order` permutes the shards, and the blocks of each
group of consecutive shards are permuted with a seed of the group (`group_seed`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_granary.common.hashing import U64, derive_key, hash64, mix64

FORMAT_VERSION = 1

_N_ROUNDS = 8
_IN_CACHE = 8192  # numbers that are hashed at a time, so that the passes over them stay in the processor's cache
_BLOCKS_DOMAIN = 0x626C_6F63_6B73  # "blocks"
_ROWS_DOMAIN = 0x726F_7773  # "rows"
_SHARDS_DOMAIN = 0x7368_6172_6473  # "shards"
_GROUP_DOMAIN = 0x67_726F_7570  # "group"


def block_order(n_blocks: int, seed: int, epoch: int, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
    """Blocks at places [start, stop) of the epoch's order: a slice of a permutation of range(n_blocks)."""
    stop = n_blocks if stop is None else min(stop, n_blocks)
    keys = _round_keys(seed, epoch)
    out = np.empty(max(stop - start, 0), dtype=np.uint64)
    for done in range(0, len(out), _IN_CACHE):
        part = out[done : done + _IN_CACHE]
        part[:] = np.arange(start + done, start + done + len(part), dtype=np.uint64)
        part[:] = _walk(part, n_blocks, keys)
    return out.view(np.int64)


def block_places(blocks: NDArray[Any], n_blocks: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The inverse of `block_order`: at which place of the epoch's order each of these blocks is."""
    return _walk(blocks.astype(np.uint64), n_blocks, _round_keys(seed, epoch), inverse=True).astype(np.int64)


def shard_order(n_shards: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The shards in the epoch's order: a permutation of range(n_shards)."""
    return block_order(n_shards, derive_key(_SHARDS_DOMAIN, seed), epoch)


def group_seed(seed: int, group: int) -> int:
    """The seed of the order of blocks in a group of shards."""
    return derive_key(_GROUP_DOMAIN, seed, group)


def pool_permutation(n_rows: int, seed: int, epoch: int, pool: int) -> NDArray[np.int64]:
    """Order in which the rows of a pool are delivered: a permutation of range(n_rows).

    Rows are sorted by a hash of their number, of which the lowest bits make room for that number: sorting one array
    of integers is several times faster than an argsort, and there are no ties.
    """
    n_bits = np.uint64(max((n_rows - 1).bit_length(), 1))
    low = (np.uint64(1) << n_bits) - np.uint64(1)
    key = derive_key(_ROWS_DOMAIN, seed, epoch, pool)
    out = np.empty(n_rows, dtype=np.uint64)
    for start in range(0, n_rows, _IN_CACHE):
        numbers = np.arange(start, min(start + _IN_CACHE, n_rows), dtype=np.uint64)
        hashed = hash64(numbers, key)
        hashed &= ~low
        np.bitwise_or(hashed, numbers, out=out[start : start + _IN_CACHE])
    out.sort()
    out &= low
    return out.view(np.int64)


def _round_keys(seed: int, epoch: int) -> list[int]:
    return [derive_key(_BLOCKS_DOMAIN, seed, epoch, i) for i in range(_N_ROUNDS)]


def _walk(values: U64, n: int, keys: list[int], *, inverse: bool = False) -> U64:
    """Permute [0, n) by a Feistel network over the next power of two, applied again while a value is outside."""
    if n <= 1:
        return values
    n_bits = max((n - 1).bit_length(), 2)
    out = _feistel(values, n_bits, keys, inverse=inverse)
    outside = np.flatnonzero(out >= n)
    while outside.size:
        again = _feistel(out[outside], n_bits, keys, inverse=inverse)
        out[outside] = again
        outside = outside[again >= n]
    return out


def _feistel(values: U64, n_bits: int, keys: list[int], *, inverse: bool) -> U64:
    """Bijection of [0, 2**n_bits): even rounds change the high half by a hash of the low one, odd the reverse."""
    low_bits = n_bits // 2
    low, high = values & np.uint64((1 << low_bits) - 1), values >> np.uint64(low_bits)
    rounds = list(enumerate(keys))
    for i, key in reversed(rounds) if inverse else rounds:
        if i % 2 == 0:
            high ^= _round_hash(low, key, n_bits - low_bits)
        else:
            low ^= _round_hash(high, key, low_bits)
    high <<= np.uint64(low_bits)
    high |= low
    return high


def _round_hash(half: U64, key: int, out_bits: int) -> U64:
    """The lowest `out_bits` of a hash of each number."""
    hashed = mix64(half + np.uint64(key))  # wraps modulo 2**64
    hashed >>= np.uint64(32)  # halves have at most 32 bits
    hashed &= np.uint64((1 << out_bits) - 1)
    return hashed
