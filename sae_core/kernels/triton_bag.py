"""`bag_sum` as Triton kernels, bitwise deterministic: no atomics, every sum in one order.

Shapes: B bags, M rows of the table, D width, nnz entries. The entries are also cut into chunks of fixed size, wherever
bags start. Chunks that lie inside one bag are summed first, each by a program of its own; then each bag adds its
entries in front of such chunks, the sums of the chunks, and the entries behind. So a latent that is active in every
row costs no more than two chunks and a few sums one after another, while the host knows no length of any bag.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 256  # above the usual k, so that the bags of a row seldom need a second kernel's sums
MAX_BLOCK = 256  # columns per program: 64 threads read 16 bytes each of a float32 row
TILE = 8  # rows of the table that a program waits for at once
# 72 registers let 28 warps of a multiprocessor wait for memory at once (`python -m benchmarks.kernel_resources`).
OPTIONS = {"num_warps": 2} | ({} if torch.version.hip else {"maxnreg": 72})


@triton.jit
def _add_entries(
    total, first, stop, indices, table, weights, columns, width, stride_row, stride_column, TILE: tl.constexpr
):
    """Add the weighted rows of entries first to stop to the total, tile by tile."""
    for start in range(first, stop, TILE):
        entries = start + tl.arange(0, TILE)[:, None]
        here = entries < stop
        weight = tl.load(weights + entries, mask=here, other=0.0).to(total.dtype)
        row = tl.load(indices + entries, mask=here, other=0).to(tl.int64)
        # A weight of zero adds nothing and its row is not read: see `_without_zeros`.
        taken = (weight != 0.0) & (columns < width)[None, :]
        at = table + row * stride_row + columns[None, :] * stride_column
        tile = tl.load(at, mask=taken, other=0.0).to(total.dtype)
        total += tl.sum(weight * tile, axis=0)
    return total


@triton.jit(do_not_specialize=["n_bags"])
def sum_chunks(
    indices, table, offsets, weights, sums, n_bags, width, stride_row, stride_column,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """sums[c] = the sum over chunk c, if it lies inside one bag; else it stays unwritten."""
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk * CHUNK
    # The bag of the first entry, by bisection: offsets[low] <= first < offsets[high].
    low = tl.zeros((), tl.int64)
    high = low + n_bags
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(offsets + middle) <= first
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    if first + CHUNK <= tl.load(offsets + high):
        columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        total = tl.zeros((BLOCK,), sums.dtype.element_ty)
        total = _add_entries(
            total, first, first + CHUNK, indices, table, weights, columns, width, stride_row, stride_column, TILE
        )
        tl.store(sums + chunk * width + columns, total, mask=inside)


@triton.jit
def sum_bags(
    indices, table, offsets, weights, sums, out, rows, squares, dots, width, stride_row, stride_column,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SQUARES: tl.constexpr, DOTS: tl.constexpr,
):  # fmt: skip
    """out[b] = the sum over bag b, with the sums of the chunks that lie inside it.

    SQUARES, DOTS: squares[b, c] and dots[b, c] are column block c's part of |out[b]|^2 and of out[b] . rows[b].
    """
    # Neighboring programs take neighboring bags and the same columns: those columns of the table stay in the cache.
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    start = tl.load(offsets + bag)
    stop = tl.load(offsets + bag + 1)
    first_chunk = (start + CHUNK - 1) // CHUNK
    n_chunks = tl.maximum(stop // CHUNK - first_chunk, 0)
    head_stop = tl.where(n_chunks > 0, first_chunk * CHUNK, stop)
    tail_start = tl.where(n_chunks > 0, (first_chunk + n_chunks) * CHUNK, stop)

    total = tl.zeros((BLOCK,), sums.dtype.element_ty)
    total = _add_entries(
        total, start, head_stop, indices, table, weights, columns, width, stride_row, stride_column, TILE
    )
    for chunk in range(first_chunk, first_chunk + n_chunks):
        total += tl.load(sums + chunk * width + columns, mask=inside, other=0.0)
    total = _add_entries(
        total, tail_start, stop, indices, table, weights, columns, width, stride_row, stride_column, TILE
    )
    written = total.to(out.dtype.element_ty)
    tl.store(out + bag * width + columns, written, mask=inside)
    if SQUARES:
        number = tl.where(inside, written, 0.0)
        part = bag * tl.num_programs(1) + tl.program_id(1)
        tl.store(squares + part, tl.sum(number * number, axis=0))
        if DOTS:
            row = tl.load(rows + bag * width + columns, mask=inside, other=0.0)
            tl.store(dots + part, tl.sum(number * row, axis=0))


def bag_sum(indices: Tensor, table: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """`sparse.bag_sum`; sums in float32 (float64 for float64), whatever the dtypes of table and weights.

    The result has the wider dtype of the two. Table and weights need not be contiguous.
    """
    return _sum(indices, table, offsets, weights, None, squares=False)[0]


def bag_sum_and_square(
    indices: Tensor, table: Tensor, offsets: Tensor, weights: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`bag_sum` and its squared norm, a float64 scalar.

    With contiguous unit-norm rows (B, D) the norm is that of what `functional.remove_parallel` leaves.
    """
    out, squares, dots = _sum(indices, table, offsets, weights, rows, squares=True)
    total = squares.sum(dtype=torch.float64)
    if rows is not None:
        total = (total - dots.sum(1, dtype=torch.float64).square().sum()).clamp_min_(0.0)
    return out, total


def _sum(
    indices: Tensor, table: Tensor, offsets: Tensor, weights: Tensor, rows: Tensor | None, *, squares: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Bags (B, D), and the parts (B, column blocks) of their squares and of their dots with rows, if asked for."""
    n_bags, width, n_entries = offsets.numel() - 1, table.shape[1], indices.numel()
    dtype = torch.promote_types(table.dtype, weights.dtype)
    out = torch.empty(n_bags, width, dtype=dtype, device=table.device)
    block = max(16, min(MAX_BLOCK, triton.next_power_of_2(width)))
    n_blocks = triton.cdiv(width, block)
    by_block = out.new_empty(n_bags if squares else 0, n_blocks)
    dots = out.new_empty(n_bags if rows is not None else 0, n_blocks)
    if out.numel() == 0:
        return out, by_block, dots
    n_chunks = n_entries // CHUNK
    sums_dtype = torch.promote_types(dtype, torch.float32)
    sums = torch.empty(max(n_chunks, 1), width, dtype=sums_dtype, device=table.device)
    indices, offsets, weights = indices.contiguous(), offsets.contiguous(), weights.contiguous()
    strides = table.stride()
    with torch.cuda.device_of(table):
        if n_chunks:
            sum_chunks[(n_chunks, n_blocks)](
                indices, table, offsets, weights, sums, n_bags, width, *strides,
                CHUNK=CHUNK, BLOCK=block, TILE=TILE, **OPTIONS,
            )  # fmt: skip
        sum_bags[(n_bags, n_blocks)](
            indices, table, offsets, weights, sums, out, out if rows is None else rows, by_block, dots, width, *strides,
            CHUNK=CHUNK, BLOCK=block, TILE=TILE, SQUARES=squares, DOTS=rows is not None, **OPTIONS,
        )  # fmt: skip
    return out, by_block, dots
