"""Dense versions of the products in `sparse.py`: the reference of their tests."""

import torch
from torch import Tensor


def dense_codes(values: Tensor, indices: Tensor, indptr: Tensor, width: int) -> Tensor:
    """Return the (N, width) matrix of a CSR pattern with values (nnz,); repeated entries add up."""
    n_rows = indptr.numel() - 1
    row_of = torch.repeat_interleave(torch.arange(n_rows, device=values.device), indptr.diff())
    return values.new_zeros(n_rows, width).index_put((row_of, indices), values, accumulate=True)


def bag_sum(indices: Tensor, table: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Dense form of `sparse.bag_sum`."""
    return dense_codes(weights, indices, offsets, table.shape[0]) @ table


def sampled_dot(rows: Tensor, columns: Tensor, indptr: Tensor, indices: Tensor) -> Tensor:
    """Dense form of `sparse.sampled_dot`."""
    row_of = torch.repeat_interleave(torch.arange(rows.shape[0], device=rows.device), indptr.diff())
    return (rows @ columns.t())[row_of, indices]
