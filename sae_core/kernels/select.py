"""Selecting large entries of a matrix by the maxima of column groups: one fast pass instead of a slow one.

Shapes: N rows, F columns, groups of GROUP columns. Columns of a group are LANES apart, so that the maxima of
neighboring groups are vector operations; where F allows it, a group lies inside a block of GROUP * LANES columns, which
keeps its entries close in memory.
"""

import torch
from torch import Tensor

from sae_granary.sae_core.kernels.sparse import true_entries

GROUP, LANES = 16, 128  # fastest at F 12288 on 2 cores: 8, 16, 32 and 32, 64, 128, F / GROUP were tried


def group_maxima(matrix: Tensor) -> Tensor:
    """Maxima (N, F / GROUP) of the groups of (N, F); F must be a multiple of GROUP."""
    return _grouped(matrix).amax(2).flatten(1)


def at_least(matrix: Tensor, maxima: Tensor, bounds: Tensor, n_most: int | None = None) -> Tensor | None:
    """Flat positions (nnz,) int64 of the entries of (N, F) that are their row's and group's bound (N, G) or more.

    Rows ascend, columns within a row stand group by group. `maxima` are the matrix's `group_maxima`. None if
    there are more than `n_most`.
    """
    n_columns, n_groups = matrix.shape[1], maxima.shape[1]
    lanes = _lanes(n_columns)
    hot = true_entries(maxima >= bounds)  # (H,) row * n_groups + group
    if n_most is not None and hot.numel() > n_most:
        return None
    row = hot // n_groups
    group = hot - row * n_groups
    block = group // lanes
    lane = group - block * lanes
    large = _grouped(matrix)[row, block, :, lane] >= bounds.flatten()[hot][:, None]  # (H, GROUP)
    found = true_entries(large)
    if n_most is not None and found.numel() > n_most:
        return None
    of_hot = found // GROUP
    first = row * n_columns + block * (GROUP * lanes) + lane
    return first[of_hot] + (found - of_hot * GROUP) * lanes


def row_topk(matrix: Tensor, k: int) -> Tensor:
    """Columns (N, k) int64 of the k largest entries of each row of (N, F), in no order.

    The k largest entries lie in the k groups with the largest maxima, so only those groups are searched.
    """
    n_rows, n_columns = matrix.shape
    if not _pays(matrix, ("cpu", "cuda")) or n_columns // GROUP < 4 * k:
        return matrix.topk(k, dim=-1, sorted=False).indices
    lanes = _lanes(n_columns)
    groups = group_maxima(matrix).topk(k, dim=-1, sorted=False).indices  # (N, k)
    block = groups // lanes
    first = block * (GROUP * lanes) + (groups - block * lanes)
    members = first[:, :, None] + torch.arange(0, GROUP * lanes, lanes, device=matrix.device)  # (N, k, GROUP)
    members = members.view(n_rows, -1)
    return members.gather(1, matrix.gather(1, members).topk(k, dim=-1, sorted=False).indices)


def entries_above(matrix: Tensor, bound: float) -> Tensor:
    """Flat positions (nnz,) int64 of the entries of (N, F) that exceed a bound, ascending."""
    if not _pays(matrix):
        return true_entries(matrix > bound)
    maxima = group_maxima(matrix)
    found = at_least(matrix, maxima, maxima.new_full((), bound).expand_as(maxima), matrix.numel() // 32)
    if found is None:
        return true_entries(matrix > bound)
    # Not by the next larger number as the bound: above 0 that is one which the processor may take as 0.
    return found[matrix.view(-1)[found] > bound].sort().values


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of values (C,), a scalar."""
    if values.is_cuda:
        # There kthvalue searches a vector with one block of threads, topk with many.
        return values.topk(k, sorted=False).values.min()
    return values.kthvalue(values.numel() - k + 1).values


def _grouped(matrix: Tensor) -> Tensor:
    """View (N, F) as (N, blocks, GROUP, lanes)."""
    lanes = _lanes(matrix.shape[1])
    return matrix.view(len(matrix), -1, GROUP, lanes)


def _lanes(n_columns: int) -> int:
    return LANES if n_columns % (GROUP * LANES) == 0 else n_columns // GROUP


def _pays(matrix: Tensor, devices: tuple[str, ...] = ("cpu",)) -> bool:
    # On CUDA `entries_above` reads the matrix once either way, and the way through groups waits for the device twice.
    n_rows, n_columns = matrix.shape
    return matrix.device.type in devices and matrix.is_contiguous() and n_rows > 0 and n_columns % GROUP == 0
