"""Selecting large entries of a matrix by the maxima of column groups: one fast pass instead of a slow one.

Shapes: N rows, F columns, groups of GROUP columns. Columns of a group are LANES apart, so that the maxima of
neighboring groups are vector operations; where F allows it, a group lies inside a block of GROUP * LANES columns, which
keeps its entries close in memory.
"""

import torch
from torch import Tensor

from sae_granary.sae_core.kernels.sparse import steps, true_entries

GROUP, LANES = 16, 128  # fastest at F 12288 on 2 cores: 8, 16, 32 and 32, 64, 128, F / GROUP were tried


def group_maxima(matrix: Tensor) -> Tensor:
    """Maxima (N, F / GROUP) of the groups of (N, F); F must be a multiple of GROUP."""
    return _grouped(matrix).amax(2).flatten(1)


def at_least(matrix: Tensor, maxima: Tensor, bounds: Tensor, n_most: int) -> Tensor | None:
    """Flat positions (nnz,) int64 of the entries of (N, F) that are their row's and group's bound (N, G) or more.

    Rows ascend, columns within a row stand group by group. `maxima` are the matrix's `group_maxima`. None if
    there are more than `n_most`.
    """
    n_columns, n_groups = matrix.shape[1], maxima.shape[1]
    lanes = _lanes(n_columns)
    hot = true_entries(maxima >= bounds)  # (H,) row * n_groups + group
    if hot.numel() > n_most:
        return None
    row = hot // n_groups
    group = hot - row * n_groups
    block = group // lanes
    lane = group - block * lanes
    large = _grouped(matrix)[row, block, :, lane] >= bounds.flatten()[hot][:, None]  # (H, GROUP)
    found = true_entries(large)
    if found.numel() > n_most:
        return None
    of_hot = found // GROUP
    first = row * n_columns + block * (GROUP * lanes) + lane
    return first[of_hot] + (found - of_hot * GROUP) * lanes


def row_topk(matrix: Tensor, k: int) -> Tensor:
    """Columns (N, k) int64 of the k largest entries of each row of (N, F), in no order.

    The k largest entries lie in the k groups with the largest maxima, so only those groups are searched.
    """
    n_rows, n_columns = matrix.shape
    if not _pays(matrix) or n_columns // GROUP < 4 * k:
        return matrix.topk(k, dim=-1, sorted=False).indices
    lanes = _lanes(n_columns)
    groups = group_maxima(matrix).topk(k, dim=-1, sorted=False).indices  # (N, k)
    first = torch.add(groups, groups // lanes, alpha=(GROUP - 1) * lanes)
    members = first[:, :, None] + steps(0, GROUP * lanes, lanes, matrix)  # (N, k, GROUP)
    members = members.view(n_rows, -1)
    return members.gather(1, matrix.gather(1, members).topk(k, dim=-1, sorted=False).indices)


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


def _pays(matrix: Tensor) -> bool:
    n_rows, n_columns = matrix.shape
    return matrix.device.type in ("cpu", "cuda") and matrix.is_contiguous() and n_rows > 0 and n_columns % GROUP == 0
