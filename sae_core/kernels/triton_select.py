"""Kernels of `gpu_screen`: the entries that may be wanted, and, once their exact values are known, those that are.

Shapes: N rows, F latents, G groups of neighboring latents, S slots for candidates. Rows may take their slots in any
order, but the entries of a row are together and ascend: what is selected does not depend on the order.
"""

import triton
import triton.language as tl

from sae_granary.sae_core.kernels.triton_screen import BIAS_SLACK, FITS, TOP, as_float, at_least, limit_of, ordered

TIED: tl.constexpr = tl.constexpr(0xFFFFFFFF)  # of a count: the lower half, of equal ones; the upper of larger ones


@triton.jit
def _candidates(entries, groups, at, stop, bound, n_slack, share, b_slack, TILE: tl.constexpr, GROUP: tl.constexpr):
    """Columns (TILE * GROUP,) of some hot groups of a row, and whether their exact entries may be the bound or more."""
    here = at < stop
    group = tl.load(groups + at, mask=here, other=0)
    limit = limit_of(bound, n_slack, tl.load(share + group, mask=here, other=0.0), b_slack)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    number = tl.load(entries + column, mask=here[:, None], other=float("-inf")).to(tl.float32)
    large = (here[:, None] & (number >= limit[:, None])).to(tl.int32)
    return tl.reshape(column, (TILE * GROUP,)), tl.reshape(large, (TILE * GROUP,))


@triton.jit(do_not_specialize=["n_slots"])
def find(
    maxima, entries, row_slack, share, numbers, counts, groups, columns, spans, first_row, n_groups, k, room, n_slots,
    BLOCK: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, BINS: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """Columns (S,) of a row's entries that may reach its bound, ascending, and the span (2,) of its slots.

    SEARCH: the bound is one of the k-th largest entry of the row, found by bisection of its groups' bounds, and a row
    has `room` slots. Otherwise rows share n_slots slots, counted in counts[0], and the bound is that of the k-th
    largest group in `histogram`, or 0 without BINS. Groups with candidates are listed in groups (n, room).
    """
    own = tl.program_id(0).to(tl.int64)
    n = first_row + own
    maxima += own * n_groups
    entries += own * n_groups * GROUP
    groups += own * room
    n_slack, b_slack = tl.load(row_slack + n), as_float(tl.load(numbers + BIAS_SLACK))
    if SEARCH:
        low = tl.zeros((), tl.int32) - 32768
        high = tl.zeros((), tl.int32) + 32768
        for _ in range(16):
            middle = (low + high) >> 1
            count = tl.zeros((), tl.int32)
            for start in range(0, n_groups, BLOCK):
                keys = at_least(maxima, start + tl.arange(0, BLOCK), n_groups, n_slack, share, b_slack)
                count += tl.sum((keys >= middle).to(tl.int32), axis=0)
            low = tl.where(count >= k, middle, low)
            high = tl.where(count >= k, high, middle)
        bits = low << 16
        bound = as_float(bits ^ ((bits >> 31) & 0x7FFFFFFF))
    elif BINS > 0:
        n_larger = tl.cumsum(tl.load(counts + 1 + tl.arange(0, BINS)).to(tl.int32), axis=0)
        lower = tl.sum((n_larger < k).to(tl.int32), axis=0)
        key = tl.where(lower < BINS - 1, tl.load(numbers + TOP) - lower, 0)
        bound = as_float(tl.maximum(key, 0) << 16)
    else:
        bound = tl.zeros((), tl.float32)
    n_hot = tl.zeros((), tl.int32)
    for start in range(0, n_groups, BLOCK):
        group = start + tl.arange(0, BLOCK)
        inside = group < n_groups
        number = tl.load(maxima + group, mask=inside, other=float("-inf")).to(tl.float32)
        limit = limit_of(bound, n_slack, tl.load(share + group, mask=inside, other=0.0), b_slack)
        hot = (inside & (number >= limit)).to(tl.int32)
        place = n_hot + tl.cumsum(hot, axis=0) - 1
        tl.store(groups + place, group, mask=(hot > 0) & (place < room))
        n_hot += tl.sum(hot, axis=0)
    tl.debug_barrier()  # each thread reads groups that others have written
    stop = tl.minimum(n_hot, room)
    if SEARCH:
        first = n * room
        end = first + room
    else:
        found = tl.zeros((), tl.int64)
        for start in range(0, stop, TILE):
            at = start + tl.arange(0, TILE)
            _, large = _candidates(entries, groups, at, stop, bound, n_slack, share, b_slack, TILE, GROUP)
            found += tl.sum(large, axis=0)
        first = tl.atomic_add(counts, found, sem="relaxed")
        end = tl.zeros((), tl.int64) + n_slots
    last = first
    for start in range(0, stop, TILE):
        at = start + tl.arange(0, TILE)
        column, large = _candidates(entries, groups, at, stop, bound, n_slack, share, b_slack, TILE, GROUP)
        place = last + tl.cumsum(large, axis=0) - 1
        tl.store(columns + place, column, mask=(large > 0) & (place < end))
        last += tl.sum(large, axis=0)
    tl.store(spans + 2 * n, tl.minimum(first, end))
    tl.store(spans + 2 * n + 1, tl.minimum(last, end))
    tl.store(numbers + FITS, 0, mask=(n_hot > room) | (last > end))


@triton.jit
def choose_largest(
    values, columns, spans, chosen, chosen_values, k, absent,
    WIDTH: tl.constexpr, SLOTS: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """The k largest (in magnitude) of a row's entries and their columns, in the order of the columns.

    Of equal ones the first are taken. Where a row has fewer than k, `absent` at column 0. A row has at most WIDTH.
    """
    n = tl.program_id(0).to(tl.int64)
    first = tl.load(spans + 2 * n)
    at = tl.arange(0, WIDTH)
    here = at < tl.load(spans + 2 * n + 1) - first
    column = tl.load(columns + first + at, mask=here, other=0)
    value = tl.load(values + first + at, mask=here, other=0.0)
    if MAGNITUDE:
        key = ordered(tl.abs(value)).to(tl.int64)
    else:
        key = ordered(value).to(tl.int64)
    key = tl.where(here, key, -2147483649)
    low = tl.zeros((), tl.int64) - 2147483648
    high = tl.zeros((), tl.int64) + 2147483648
    for _ in range(32):
        middle = (low + high) >> 1
        enough = tl.sum((key >= middle).to(tl.int32), axis=0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    n_larger = tl.sum((key > low).to(tl.int32), axis=0)
    tied = (key == low).to(tl.int32)
    kept = (key > low) | ((tied > 0) & (tl.cumsum(tied, axis=0) <= k - n_larger))
    place = n * k + tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(chosen + place, column.to(tl.int64), mask=kept)
    tl.store(chosen_values + place, value, mask=kept)
    slot = tl.arange(0, SLOTS)
    empty = (slot >= tl.sum(kept.to(tl.int32), axis=0)) & (slot < k)
    tl.store(chosen + n * k + slot, tl.zeros((SLOTS,), tl.int64), mask=empty)
    tl.store(chosen_values + n * k + slot, tl.zeros((SLOTS,), tl.float32) + absent, mask=empty)


@triton.jit
def _compared(values, columns, bound, start, stop, BLOCK: tl.constexpr, TIES: tl.constexpr, PER_LATENT: tl.constexpr):
    """Columns and values of some candidates; whether they are above the bound, and whether they equal it."""
    slot = start + tl.arange(0, BLOCK)
    here = slot < stop
    column = tl.load(columns + slot, mask=here, other=0)
    value = tl.load(values + slot, mask=here, other=float("-inf"))
    if PER_LATENT:
        own = tl.load(bound + column)
    elif TIES:
        own = tl.load(bound)
    else:
        own = bound
    return column, value, (here & (value > own)).to(tl.int32), (here & (value == own)).to(tl.int32)


@triton.jit
def count_wanted(
    values, columns, spans, bound, counts, BLOCK: tl.constexpr, TIES: tl.constexpr, PER_LATENT: tl.constexpr
):
    """counts[n + 1] of a row's values above the bound, times 2^32, plus with TIES those that equal it.

    The bound is bound[0] with TIES, bound[f] with PER_LATENT, or a number.
    """
    n = tl.program_id(0).to(tl.int64)
    stop = tl.load(spans + 2 * n + 1)
    count = tl.zeros((), tl.int64)
    for start in range(tl.load(spans + 2 * n), stop, BLOCK):
        _, _, larger, tied = _compared(values, columns, bound, start, stop, BLOCK, TIES, PER_LATENT)
        count += tl.sum(larger, axis=0).to(tl.int64) << 32
        if TIES:
            count += tl.sum(tied, axis=0)
    tl.store(counts, 0, mask=n == 0)
    tl.store(counts + n + 1, count)


@triton.jit(do_not_specialize=["n_slots"])
def keep_wanted(
    values, columns, spans, bound, counts, rows, kept_columns, kept_values, indptr, numbers, n_slots, n_latents, absent,
    BLOCK: tl.constexpr, TIES: tl.constexpr, PER_LATENT: tl.constexpr,
):  # fmt: skip
    """What `count_wanted` counts, row by row in n_slots slots; of equal ones the first. Its counts are added up before.

    Empty slots come last. They are of the last row, share as few latents as possible, and have the value `absent`.
    """
    n = tl.program_id(0).to(tl.int64)
    n_rows = tl.num_programs(0).to(tl.int64)
    total, before = tl.load(counts + n_rows), tl.load(counts + n)
    n_tied = tl.maximum(n_slots - (total >> 32), 0)  # for how many equal ones there is room
    rank = before & TIED
    place = (before >> 32) + tl.minimum(rank, n_tied)
    tl.store(indptr, 0, mask=n == 0)
    stop = tl.load(spans + 2 * n + 1)
    for start in range(tl.load(spans + 2 * n), stop, BLOCK):
        column, value, kept, tied = _compared(values, columns, bound, start, stop, BLOCK, TIES, PER_LATENT)
        if TIES:
            kept += tied * (rank + tl.cumsum(tied, axis=0) <= n_tied).to(tl.int32)
            rank += tl.sum(tied, axis=0)
        at = place + tl.cumsum(kept, axis=0) - 1
        fits = (kept > 0) & (at < n_slots)
        tl.store(rows + at, tl.zeros((BLOCK,), tl.int64) + n, mask=fits)
        tl.store(kept_columns + at, column.to(tl.int64), mask=fits)
        tl.store(kept_values + at, value, mask=fits)
        place += tl.sum(kept, axis=0)
    tl.store(indptr + n + 1, tl.minimum(place, n_slots))
    used = (total >> 32) + tl.minimum(total & TIED, n_tied)
    tl.store(numbers + FITS, 0, mask=used > n_slots)
    for start in range(used + n * BLOCK, n_slots, n_rows * BLOCK):
        at = start + tl.arange(0, BLOCK)
        empty = at < n_slots
        tl.store(rows + at, tl.zeros((BLOCK,), tl.int64) + n_rows - 1, mask=empty)
        tl.store(kept_columns + at, at % n_latents, mask=empty)
        tl.store(kept_values + at, tl.zeros((BLOCK,), tl.float32) + absent, mask=empty)
