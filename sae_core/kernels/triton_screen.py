"""Kernels of `gpu_screen`: factors in bfloat16, their product, and the maxima of its groups.

Shapes: N rows, D width, F latents, G = F / GROUP groups of neighboring latents. The slack of entry (n, j) in group g,
how far the product may lie from the exact one, is bias_slack + row_slack[n] * share[g] (`screen.py`). Sums have one
order and atomics are of integers, so equal inputs give equal bits.

`numbers` (N_NUMBERS,), int32 and 1 at first, is what all programs share: a flag, and bits of nonnegative float32, which
compare like them.
"""

import triton
import triton.language as tl

GROUP = 16  # latents: 32 bytes of bfloat16, what the memory of a GPU reads at once
N_NUMBERS = 6
LARGEST_LOSS: tl.constexpr = tl.constexpr(0)  # over latents: norm of what rounding loses of one
LARGEST_NORM: tl.constexpr = tl.constexpr(1)  # of what it keeps
LARGEST_BIAS: tl.constexpr = tl.constexpr(2)  # in magnitude
BIAS_SLACK: tl.constexpr = tl.constexpr(3)
TOP: tl.constexpr = tl.constexpr(4)  # the upper 16 bits of the largest positive entry
FITS: tl.constexpr = tl.constexpr(5)  # 0 if there was no room, or nothing bounds the slack
ROOMY: tl.constexpr = tl.constexpr(1 + 1e-4)  # norms, slacks and shares are themselves rounded


@triton.jit
def ordered(numbers):
    """int32 that compare like the float32 numbers."""
    bits = numbers.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _key(numbers):
    """The upper 16 bits of what compares like the float32 numbers."""
    return ordered(numbers) >> 16


@triton.jit
def _largest_bits(magnitudes):
    """Bits of the largest of some nonnegative float32, which compare like them; NaN is larger than all."""
    return tl.max(magnitudes.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)


@triton.jit
def as_float(bits):
    """The float32 of these bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def limit_of(bound, n_slack, shares, bias_slack):
    """Least bfloat16 of entries whose exact value may be the bound or more."""
    roomy = bound - tl.abs(bound) * 1.1920929e-07
    return (roomy - (bias_slack + n_slack * shares)).to(tl.bfloat16).to(tl.float32)


@triton.jit
def round_latents(
    matrix, bias, bound, rounded, shifted, losses, kept_norms, numbers, width, stride_row, stride_column, underflow,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """A group of latents in bfloat16; the largest norm (G,) of what that loses, and of what it keeps, of one of them.

    `underflow` bounds what a norm lacks because small squares are 0. SHIFT: shifted (F,) is bias - bound.
    """
    g = tl.program_id(0)
    f = (g * GROUP + tl.arange(0, GROUP)).to(tl.int64)
    lost = tl.zeros((GROUP, BLOCK), tl.float32)
    kept = tl.zeros((GROUP, BLOCK), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = (at < width)[None, :]
        places = matrix + f[:, None] * stride_row + at[None, :] * stride_column
        number = tl.load(places, mask=inside, other=0.0).to(tl.float32)
        low = number.to(tl.bfloat16)
        tl.store(rounded + f[:, None] * width + at[None, :], low, mask=inside)
        back = low.to(tl.float32)
        lost += (number - back) * (number - back)
        kept += back * back
    loss = _largest_bits(tl.sqrt(tl.sum(lost, axis=1)) + underflow)
    norm = _largest_bits(tl.sqrt(tl.sum(kept, axis=1)) + underflow)
    tl.store(losses + g, as_float(loss))
    tl.store(kept_norms + g, as_float(norm))
    tl.atomic_max(numbers + LARGEST_LOSS, loss, sem="relaxed")
    tl.atomic_max(numbers + LARGEST_NORM, norm, sem="relaxed")
    offset = tl.load(bias + f)
    size = tl.abs(offset)
    if SHIFT:
        offset -= tl.load(bound + f)
        tl.store(shifted + f, offset)
        size += tl.abs(offset)
    tl.atomic_max(numbers + LARGEST_BIAS, _largest_bits(size), sem="relaxed")


@triton.jit
def round_rows(
    matrix, rounded, row_slack, losses, kept_norms, share, numbers, n_groups, width, stride_row, stride_column,
    underflow, summing, tiny, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row in bfloat16 and its slack, after `round_latents`; the shares (G,) and the slack of the bias.

    `summing`, relative to the product of norms, is how far sums of float32 may differ, and `tiny` is what underflows.
    """
    n = tl.program_id(0).to(tl.int64)
    exact = tl.zeros((BLOCK,), tl.float32)
    lost = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = at < width
        number = tl.load(matrix + n * stride_row + at * stride_column, mask=inside, other=0.0).to(tl.float32)
        low = number.to(tl.bfloat16)
        tl.store(rounded + n * width + at, low, mask=inside)
        back = low.to(tl.float32)
        exact += number * number
        lost += (number - back) * (number - back)
    norm = tl.sqrt(tl.sum(exact, axis=0)) + underflow
    loss = tl.sqrt(tl.sum(lost, axis=0)) + underflow
    largest_loss = as_float(tl.load(numbers + LARGEST_LOSS))
    largest_norm = as_float(tl.load(numbers + LARGEST_NORM))
    largest_bias = as_float(tl.load(numbers + LARGEST_BIAS))
    slack = (norm * (largest_loss + summing * largest_norm) + loss * largest_norm) * ROOMY
    bias_slack = (summing * largest_bias + tiny) * ROOMY
    tl.store(row_slack + n, slack)
    tl.store(numbers + BIAS_SLACK, bias_slack.to(tl.int32, bitcast=True), mask=n == 0)
    bounded = slack + bias_slack < float("inf")  # then no sum of products overflows: squares of the norms do before
    tl.store(numbers + FITS, 0, mask=bounded == 0)
    for start in range(n * BLOCK, n_groups, tl.num_programs(0).to(tl.int64) * BLOCK):
        g = start + tl.arange(0, BLOCK)
        inside = g < n_groups
        of_loss = tl.load(losses + g, mask=inside, other=0.0) / largest_loss
        of_norm = tl.load(kept_norms + g, mask=inside, other=0.0) / largest_norm
        tl.store(share + g, tl.maximum(of_loss, of_norm) * ROOMY, mask=inside)


@triton.jit
def product(
    rows, latents, bias, entries, maxima, numbers, n_rows, n_latents, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr,
    GROUP: tl.constexpr, MAGNITUDE: tl.constexpr, STORE: tl.constexpr, FIND_TOP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Entries = rows (N, D) @ latents (F, D).T + bias (or their magnitudes) and group maxima, rounded to bfloat16.

    Sums in float32, the bias added to them. Programs that run at the same time share TOGETHER blocks of rows, which
    stay in the cache with the latents. FIND_TOP: numbers[TOP] is found, too.
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
    inside = there & (group < n_groups)[None, :]
    tl.store(places, largest.to(tl.bfloat16), mask=inside)
    if FIND_TOP:
        top = tl.max(tl.max(tl.where(inside, _key(largest.to(tl.bfloat16).to(tl.float32)), 0), axis=1), axis=0)
        tl.atomic_max(numbers + TOP, top, sem="relaxed")


@triton.jit
def at_least(maxima, group, n_groups, n_slack, share, bias_slack):
    """Keys of lower bounds of the largest exact entry of some groups of a row."""
    inside = group < n_groups
    number = tl.load(maxima + group, mask=inside, other=float("-inf")).to(tl.float32)
    slack = bias_slack + n_slack * tl.load(share + group, mask=inside, other=0.0)
    return _key(number - tl.abs(number) * 0.0078125 - slack)  # what rounding to bfloat16 moves, in any mode


@triton.jit
def histogram(
    maxima, row_slack, share, numbers, counts, first_row, n_rows, n_groups, BINS: tl.constexpr, BLOCK: tl.constexpr
):
    """Add to counts[1 + b] how many groups have a largest exact entry whose lower bound has the key numbers[TOP] - b.

    A program counts every num_programs-th of n_rows rows. The last bin holds all that are smaller.
    """
    top, b_slack = tl.load(numbers + TOP), as_float(tl.load(numbers + BIAS_SLACK))
    total = tl.zeros((BINS,), tl.int32)
    row = maxima + tl.program_id(0).to(tl.int64) * n_groups
    for n in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        n_slack = tl.load(row_slack + first_row + n)
        for start in range(0, n_groups, BLOCK):
            group = start + tl.arange(0, BLOCK)
            keys = at_least(row, group, n_groups, n_slack, share, b_slack)
            bins = tl.minimum(tl.maximum(top - keys, 0), BINS - 1)
            total += tl.histogram(tl.where(group < n_groups, bins, BINS - 1), BINS)
        row += tl.num_programs(0).to(tl.int64) * n_groups
    tl.atomic_add(counts + 1 + tl.arange(0, BINS), total.to(tl.int64), sem="relaxed")
