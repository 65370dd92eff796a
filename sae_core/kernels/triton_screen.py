"""Kernels of `gpu_screen`: a product in bfloat16 with the maxima of its groups, and the selections that follow.

Shapes: N rows, D width, F latents, G = F / GROUP groups of neighboring latents. The slack of entry (n, j) in group g,
how far the product may lie from the exact one, is bias_slack + row_slack[n] * share[g] (`screen.py`). Sums have one
order and only integers are added by atomics, so equal inputs give equal bits.
"""

import triton
import triton.language as tl

GROUP = 16  # latents: 32 bytes of bfloat16, what the memory of a GPU reads at once


@triton.jit
def _ordered(numbers):
    """int32 that compare like the float32 numbers."""
    bits = numbers.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _limit(bound, n_slack, shares, bias_slack):
    """Least bfloat16 of entries whose exact value may be the bound or more."""
    roomy = bound - tl.abs(bound) * 1.1920929e-07
    return (roomy - (bias_slack + n_slack * shares)).to(tl.bfloat16).to(tl.float32)


@triton.jit
def round_rows(matrix, rounded, norms, n_rows, width, stride_row, stride_column, BLOCK: tl.constexpr):
    """A row in bfloat16; norms[0, n] of the row, norms[1, n] of what rounding loses, norms[2, n] of what it keeps."""
    n = tl.program_id(0).to(tl.int64)
    exact = tl.zeros((BLOCK,), tl.float32)
    lost = tl.zeros((BLOCK,), tl.float32)
    kept = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = at < width
        number = tl.load(matrix + n * stride_row + at * stride_column, mask=inside, other=0.0).to(tl.float32)
        low = number.to(tl.bfloat16)
        tl.store(rounded + n * width + at, low, mask=inside)
        back = low.to(tl.float32)
        exact += number * number
        lost += (number - back) * (number - back)
        kept += back * back
    tl.store(norms + n, tl.sqrt(tl.sum(exact, axis=0)))
    tl.store(norms + n_rows + n, tl.sqrt(tl.sum(lost, axis=0)))
    tl.store(norms + 2 * n_rows + n, tl.sqrt(tl.sum(kept, axis=0)))


@triton.jit
def product(
    rows, latents, bias, entries, maxima, n_rows, n_latents, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr,
    GROUP: tl.constexpr, MAGNITUDE: tl.constexpr, STORE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Entries = rows (N, D) @ latents (F, D).T + bias (or their magnitudes) and group maxima, rounded to bfloat16.

    Sums in float32, the bias added to them. Programs that run at the same time share TOGETHER blocks of rows, which
    stay in the cache with the latents.
    """
    n_blocks_m = tl.cdiv(n_rows, BLOCK_M)
    n_blocks_n = tl.cdiv(n_latents, BLOCK_N)
    program = tl.program_id(0)
    per_band = TOGETHER * n_blocks_n
    first_m = (program // per_band) * TOGETHER
    height = tl.minimum(n_blocks_m - first_m, TOGETHER)
    m = (first_m + (program % per_band) % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = ((program % per_band) // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and latents beyond the end are read again from the start, and not stored.
    row = rows + (m % n_rows).to(tl.int64)[:, None] * width
    latent = latents + (n % n_latents).to(tl.int64)[None, :] * width
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        a = tl.load(row + at[None, :], mask=at[None, :] < width, other=0.0)
        b = tl.load(latent + at[:, None], mask=at[:, None] < width, other=0.0)
        if WIDEN:  # the interpreter would multiply the bits of bfloat16 as integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total)
    total += tl.load(bias + n, mask=n < n_latents, other=0.0)[None, :]
    if MAGNITUDE:
        total = tl.abs(total)
    there = (m < n_rows)[:, None]
    if STORE:
        places = entries + m.to(tl.int64)[:, None] * n_latents + n[None, :]
        tl.store(places, total.to(tl.bfloat16), mask=there & (n < n_latents)[None, :])
    largest = tl.max(tl.reshape(total, (BLOCK_M, BLOCK_N // GROUP, GROUP)), axis=2)
    group = (tl.program_id(0) % per_band) // height * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    n_groups = n_latents // GROUP
    places = maxima + m.to(tl.int64)[:, None] * n_groups + group[None, :]
    tl.store(places, largest.to(tl.bfloat16), mask=there & (group < n_groups)[None, :])


@triton.jit
def _at_least(maxima, group, n_groups, n_slack, share, bias_slack):
    """Keys of lower bounds of the largest exact entry of some groups of a row: the upper 16 bits of float32."""
    inside = group < n_groups
    number = tl.load(maxima + group, mask=inside, other=float("-inf")).to(tl.float32)
    slack = bias_slack + n_slack * tl.load(share + group, mask=inside, other=0.0)
    return _ordered(number - tl.abs(number) * 0.0078125 - slack) >> 16  # what rounding to bfloat16 moves, in any mode


@triton.jit
def find_hot_groups(
    maxima, row_slack, share, bias_slack, least, groups, n_hot, n_groups, k, room,
    BLOCK: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """Groups of a row that may hold an entry of least[n] or more, ascending, in `room` places; and their number.

    SEARCH: least[n], a lower bound of the k-th largest exact entry, is found first, by bisection of the groups' bounds.
    Otherwise it is the same for all rows, least[0].
    """
    n = tl.program_id(0).to(tl.int64)
    maxima += n * n_groups
    n_slack, b_slack = tl.load(row_slack + n), tl.load(bias_slack)
    if SEARCH:
        low = tl.zeros((), tl.int32) - 32768
        high = tl.zeros((), tl.int32) + 32768
        for _ in range(16):
            middle = (low + high) >> 1
            count = tl.zeros((), tl.int32)
            for start in range(0, n_groups, BLOCK):
                keys = _at_least(maxima, start + tl.arange(0, BLOCK), n_groups, n_slack, share, b_slack)
                count += tl.sum((keys >= middle).to(tl.int32), axis=0)
            low = tl.where(count >= k, middle, low)
            high = tl.where(count >= k, high, middle)
        bits = low << 16
        bound = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(least + n, bound)
    else:
        bound = tl.load(least)
    found = tl.zeros((), tl.int32)
    for start in range(0, n_groups, BLOCK):
        group = start + tl.arange(0, BLOCK)
        inside = group < n_groups
        number = tl.load(maxima + group, mask=inside, other=float("-inf")).to(tl.float32)
        limit = _limit(bound, n_slack, tl.load(share + group, mask=inside, other=0.0), b_slack)
        hot = (inside & (number >= limit)).to(tl.int32)
        place = found + tl.cumsum(hot, axis=0) - 1
        tl.store(groups + n * room + place, group, mask=(hot > 0) & (place < room))
        found += tl.sum(hot, axis=0)
    tl.store(n_hot + n, found)


@triton.jit
def collect(
    entries, groups, n_hot, least, row_slack, share, bias_slack, starts, rows, columns, counts,
    first_row, n_latents, room, n_slots,
    TILE: tl.constexpr, GROUP: tl.constexpr, SAME: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """counts[n] of the entries of a row that may be its bound or more; with WRITE their places, from slot starts[n]."""
    n = tl.program_id(0).to(tl.int64)
    if SAME:
        bound = tl.load(least)
    else:
        bound = tl.load(least + n)
    n_slack, b_slack = tl.load(row_slack + n), tl.load(bias_slack)
    stop = tl.minimum(tl.load(n_hot + n), room)
    found = tl.zeros((), tl.int64)
    if WRITE:
        found += tl.load(starts + n)
    for start in range(0, stop, TILE):
        at = start + tl.arange(0, TILE)
        here = at < stop
        group = tl.load(groups + n * room + at, mask=here, other=0)
        limit = _limit(bound, n_slack, tl.load(share + group, mask=here, other=0.0), b_slack)
        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        number = tl.load(entries + n * n_latents + column, mask=here[:, None], other=float("-inf")).to(tl.float32)
        large = tl.reshape((here[:, None] & (number >= limit[:, None])).to(tl.int32), (TILE * GROUP,))
        if WRITE:
            place = found + tl.cumsum(large, axis=0) - 1
            taken = (large > 0) & (place < n_slots)
            tl.store(columns + place, tl.reshape(column, (TILE * GROUP,)).to(tl.int64), mask=taken)
            tl.store(rows + place, tl.zeros((TILE * GROUP,), tl.int64) + first_row + n, mask=taken)
        found += tl.sum(large, axis=0)
    if not WRITE:
        tl.store(counts + n, found)


@triton.jit
def choose_largest(
    values, columns, indptr, chosen, chosen_values, k, absent,
    WIDTH: tl.constexpr, SLOTS: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """The k largest (in magnitude) of a row's entries and their columns, in the order of the columns.

    Of equal ones the first are taken. Where a row has fewer than k, `absent` at column 0. Only WIDTH entries are read.
    """
    n = tl.program_id(0).to(tl.int64)
    first = tl.load(indptr + n)
    at = tl.arange(0, WIDTH)
    here = at < tl.load(indptr + n + 1) - first
    column = tl.load(columns + first + at, mask=here, other=0)
    value = tl.load(values + first + at, mask=here, other=0.0)
    if MAGNITUDE:
        key = _ordered(tl.abs(value)).to(tl.int64)
    else:
        key = _ordered(value).to(tl.int64)
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
    tl.store(chosen + place, column, mask=kept)
    tl.store(chosen_values + place, value, mask=kept)
    slot = tl.arange(0, SLOTS)
    empty = (slot >= tl.sum(kept.to(tl.int32), axis=0)) & (slot < k)
    tl.store(chosen + n * k + slot, tl.zeros((SLOTS,), tl.int64), mask=empty)
    tl.store(chosen_values + n * k + slot, tl.zeros((SLOTS,), tl.float32) + absent, mask=empty)


@triton.jit
def histogram(
    maxima, row_slack, share, bias_slack, largest, counts, n_rows, n_groups, BINS: tl.constexpr, BLOCK: tl.constexpr
):
    """Add to counts[b] how many groups have a largest exact entry whose lower bound has the key largest[0] - b.

    A program counts every num_programs-th row. The last bin holds all that are smaller.
    """
    top, b_slack = tl.load(largest), tl.load(bias_slack)
    total = tl.zeros((BINS,), tl.int32)
    row = maxima + tl.program_id(0).to(tl.int64) * n_groups
    for n in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        n_slack = tl.load(row_slack + n)
        for start in range(0, n_groups, BLOCK):
            group = start + tl.arange(0, BLOCK)
            keys = _at_least(row, group, n_groups, n_slack, share, b_slack)
            bins = tl.minimum(tl.maximum(top - keys, 0), BINS - 1)
            total += tl.histogram(tl.where(group < n_groups, bins, BINS - 1), BINS)
        row += tl.num_programs(0).to(tl.int64) * n_groups
    tl.atomic_add(counts + tl.arange(0, BINS), total)
