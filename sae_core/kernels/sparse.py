"""The two sparse products that a step needs, deterministic on the CPU and on CUDA (no float atomics).

Shapes: N rows, M columns of the pattern (latents), D width, nnz entries of the pattern.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_granary.sae_core.kernels.choice import takes_triton

# Entries whose factors are gathered at once where no sampled product exists: 2**16 x 768 fp32 is 200 MB.
GATHER_CHUNK = 2**16
MAX_CACHED = 2**18  # numbers: 2 MB

with warnings.catch_warnings():
    # torch announces once per process that CSR tensors are in beta.
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))


def steps(start: int, stop: int, step: int, like: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """torch.arange on the device of a tensor, cached: do not modify it, and give it to nobody."""
    return _constant(torch.arange, (start, stop, step), (stop - start) // step, like, dtype)


def ones(n_rows: int, like: Tensor) -> Tensor:
    """A column (N, 1) of ones, cached like `steps`."""
    return _constant(torch.ones, (n_rows, 1), n_rows, like, like.dtype)


def _constant(make: Callable[..., Tensor], sizes: tuple[int, ...], n: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    if type(like) is not Tensor or n > MAX_CACHED:  # a fake tensor, such as those of torch.export, is not kept
        return make(*sizes, dtype=dtype, device=like.device)
    return _cached(make, sizes, dtype, like.device)


@lru_cache(maxsize=16)
def _cached(make: Callable[..., Tensor], sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it may be kept for a gradient later
        return make(*sizes, dtype=dtype, device=device)


def bag_sum(indices: Tensor, table: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return out[r] = sum over entries j of bag r of weights[j] * table[indices[j]].

    indices (nnz,) int64, table (M, D), offsets (N + 1,) int64, weights (nnz,) or None for 1 -> (N, D). An empty bag
    gives zeros.
    The entries of a bag are added in their order, so equal inputs give equal bits.
    """
    if indices.numel() == 0:
        return table.new_zeros(offsets.numel() - 1, table.shape[1])
    if takes_triton(table):
        from sae_granary.sae_core.kernels import triton_bag

        return triton_bag.bag_sum(
            indices, table, offsets, table.new_ones(indices.shape) if weights is None else weights
        )
    return F.embedding_bag(indices, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def bag_sum_and_square(
    indices: Tensor, table: Tensor, offsets: Tensor, weights: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`bag_sum` as a Triton kernel, and its squared norm, a float64 scalar, found while it is written.

    With contiguous unit-norm rows (N, D) the norm is that of what `functional.remove_parallel` leaves.
    """
    from sae_granary.sae_core.kernels import triton_bag

    return triton_bag.bag_sum_and_square(indices, table, offsets, weights, rows)


def add_rows_and_squares(grad: Tensor, latents: Tensor, more: Tensor, rows: Tensor | None) -> Tensor:
    """Add more (A, D) to some distinct rows (A,) of grad (M, D), as a Triton kernel.

    Return by how much that changes the squared norm of grad, a float64 scalar; with contiguous unit-norm rows (M, D)
    the norm of what `functional.remove_parallel` leaves.
    """
    from sae_granary.sae_core.kernels import triton_rows

    return triton_rows.add_to_rows(grad, latents, more.contiguous(), rows).sum()


def sampled_dot(rows: Tensor, columns: Tensor, indptr: Tensor, indices: Tensor) -> Tensor:
    """Return the entries of rows @ columns.T at a CSR pattern: out[j] = rows[r(j)] . columns[indices[j]].

    rows (N, D), columns (M, D), indptr (N + 1,), indices (nnz,) -> (nnz,). The full (N, M) product is never built.
    """
    if indices.numel() == 0:
        return rows.new_zeros(0)
    if takes_triton(rows):
        from sae_granary.sae_core.kernels import triton_dot

        return triton_dot.sampled_dot(rows, columns, indptr, indices)
    if _has_sampled_product(rows):
        shape = (rows.shape[0], columns.shape[0])
        zeros = torch.sparse_csr_tensor(indptr, indices, rows.new_zeros(indices.numel()), shape, check_invariants=False)
        product: Tensor = torch.sparse.sampled_addmm(zeros, rows, columns.t(), beta=0.0)
        return product.values()
    row_of = torch.repeat_interleave(torch.arange(rows.shape[0], device=rows.device), indptr.diff())
    parts = [
        (rows[r] * columns[c]).sum(-1)
        for r, c in zip(torch.split(row_of, GATHER_CHUNK), torch.split(indices, GATHER_CHUNK), strict=True)
    ]
    return torch.cat(parts)


def _has_sampled_product(rows: Tensor) -> bool:
    if rows.dtype not in (torch.float32, torch.float64):
        return False
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return rows.is_cuda or (rows.device.type == "cpu" and has_mkl)


def true_entries(mask: Tensor) -> Tensor:
    """Return the flat positions (nnz,) int64 of the true entries of a contiguous bool mask, ascending.

    Eight entries are looked at as one 64-bit word, so a sparse mask is scanned 2-3 times faster than by `nonzero`.
    """
    flat = mask.reshape(-1)
    if flat.numel() % 8 or flat.storage_offset() % 8 or not mask.is_contiguous():
        return flat.nonzero().squeeze(1)
    words = flat.view(torch.int64)
    hot = words.nonzero().squeeze(1)
    word, bit = words[hot].view(torch.bool).view(-1, 8).nonzero(as_tuple=True)
    return hot[word] * 8 + bit
