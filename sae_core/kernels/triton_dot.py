"""`sampled_dot` as a Triton kernel: each entry is computed by one program, in one order of sums.

Shapes: N rows, M columns of the pattern, D width, nnz entries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES = 8  # dot products that a program takes at once, for one read of its row
SPLIT = 4  # programs that share a row's entries: k = 32 is one tile of each, and a long row is no bottleneck
MAX_BLOCK = 256  # width that is multiplied at once
# Without a limit Triton 3.6 takes 79 registers, and fewer programs wait for memory at once.
OPTIONS = {"num_warps": 4} | ({} if torch.version.hip else {"maxnreg": 72})


@triton.jit
def dot_at_entries(
    rows, columns, indptr, indices, out, bias, width,
    rows_stride_row, rows_stride_column, columns_stride_row, columns_stride_column,
    ENTRIES: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, ACCUMULATOR: tl.constexpr,
    STEP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """out[j] = rows[r] . columns[indices[j]] for every SPLIT-th tile of the entries of row r.

    They are those from indptr[STEP r] to indptr[STEP r + 1]. BIAS: bias[indices[j]] is added to the rounded sum.
    """
    r = tl.program_id(0).to(tl.int64)
    stop = tl.load(indptr + r * STEP + 1)
    first = tl.load(indptr + r * STEP) + tl.program_id(1) * ENTRIES
    for start in range(first, stop, SPLIT * ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        here = entries < stop
        column = tl.load(indices + entries, mask=here, other=0).to(tl.int64)
        products = tl.zeros((ENTRIES, BLOCK), ACCUMULATOR)
        for left in range(0, width, BLOCK):
            at = left + tl.arange(0, BLOCK).to(tl.int64)
            inside = at < width
            row = tl.load(rows + r * rows_stride_row + at * rows_stride_column, mask=inside, other=0.0)
            places = columns + column[:, None] * columns_stride_row + at[None, :] * columns_stride_column
            tile = tl.load(places, mask=here[:, None] & inside[None, :], other=0.0)
            products += row.to(ACCUMULATOR)[None, :] * tile.to(ACCUMULATOR)
        dots = tl.sum(products, axis=1).to(out.dtype.element_ty)
        if BIAS:
            dots += tl.load(bias + column, mask=here, other=0.0)
        tl.store(out + entries, dots, mask=here)


def sampled_dot(rows: Tensor, columns: Tensor, indptr: Tensor, indices: Tensor) -> Tensor:
    """`sparse.sampled_dot`; sums in float32 (float64 for float64), whatever the dtypes of rows and columns.

    The result has the wider dtype of the two. Rows and columns need not be contiguous.
    """
    dtype = torch.promote_types(rows.dtype, columns.dtype)
    out = torch.zeros(indices.numel(), dtype=dtype, device=rows.device)  # behind the last row's entries they stay
    if len(rows) == 0 or out.numel() == 0:
        return out
    _launch(rows, columns, indptr.contiguous(), indices.contiguous(), out, None)
    return out


def dots_in_spans(rows: Tensor, columns: Tensor, spans: Tensor, indices: Tensor, bias: Tensor, out: Tensor) -> None:
    """Write entries of rows @ columns.T + bias (M,) to the spans (N, 2), where those of each row begin and end."""
    _launch(rows, columns, spans, indices, out, bias)


def _launch(rows: Tensor, columns: Tensor, indptr: Tensor, indices: Tensor, out: Tensor, bias: Tensor | None) -> None:
    n_rows, width = rows.shape
    accumulator = tl.float64 if out.dtype == torch.float64 else tl.float32
    block = max(16, min(MAX_BLOCK, triton.next_power_of_2(width)))
    with torch.cuda.device_of(rows):
        dot_at_entries[(n_rows, SPLIT)](
            rows, columns, indptr, indices, out, out if bias is None else bias, width, *rows.stride(),
            *columns.stride(), ENTRIES=ENTRIES, SPLIT=SPLIT, BLOCK=block, ACCUMULATOR=accumulator,
            STEP=indptr.stride(0), BIAS=bias is not None, **OPTIONS,
        )  # fmt: skip
