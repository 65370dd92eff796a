"""Codes: the activations of an SAE as a sparse matrix, from the encoder to the metrics.

Shapes: N rows, F = d_sae latents, nnz stored entries. A latent that is not stored is zero; a stored one may be zero.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sae_granary.sae_core.kernels import true_entries
from sae_granary.sae_core.kernels.deferred import current, host_waits
from sae_granary.sae_core.kernels.sparse import steps


class Transposed(NamedTuple):
    """The same entries grouped by latent."""

    order: Tensor  # (nnz,) position of each entry in the row-wise order
    rows: Tensor  # (nnz,) row of each entry
    offsets: Tensor  # (F + 1,) where each latent's entries start


@dataclass(frozen=True, eq=False)
class Pattern:
    """Which latents of which rows are stored: CSR without values.

    A full pattern (`indices is None`) stores every latent of every row; its values are then a (N, F) matrix. It is
    what a variant uses while its codes are dense, at the start of an L1 training for example.
    """

    n_rows: int
    d_sae: int
    indices: Tensor | None = None  # (nnz,) int64 latent of each entry
    indptr: Tensor | None = None  # (N + 1,) int64 where each row's entries start
    rows: Tensor | None = None  # (nnz,) int64 row of each entry, where it is known beforehand; see `row_of`
    per_row: int | None = None  # number of entries of every row, where it is the same

    @classmethod
    def fixed_k(cls, indices: Tensor, d_sae: int) -> "Pattern":
        """Pattern with the same number of entries in every row, from indices (N, k)."""
        n_rows, k = indices.shape
        if k == 0:
            indptr = indices.new_zeros(n_rows + 1)
        elif current() is None:  # it goes to users, who may change it
            indptr = torch.arange(0, n_rows * k + 1, k, device=indices.device)
        else:
            indptr = steps(0, n_rows * k + 1, k, indices)
        return cls(n_rows, d_sae, indices.reshape(-1), indptr, per_row=k)

    @classmethod
    def of_mask(cls, mask: Tensor) -> "Pattern":
        """Pattern of the true entries of mask (N, F)."""
        n_rows, d_sae = mask.shape
        entries = true_entries(mask)
        return cls.of_rows(entries // d_sae, entries % d_sae, n_rows, d_sae)

    @classmethod
    def of_rows(cls, rows: Tensor, indices: Tensor, n_rows: int, d_sae: int) -> "Pattern":
        """Pattern of entries (rows, indices), both (nnz,), rows ascending."""
        return cls(n_rows, d_sae, indices, _offsets(rows, n_rows), rows)

    @property
    def is_full(self) -> bool:
        """Whether every latent of every row is stored."""
        return self.indices is None

    @property
    def entries(self) -> tuple[Tensor, Tensor]:
        """(indices, indptr) of a pattern that is not full."""
        assert self.indices is not None
        assert self.indptr is not None
        return self.indices, self.indptr

    @cached_property
    def row_of(self) -> Tensor:
        """(nnz,) row of each entry."""
        if self.rows is not None:
            return self.rows
        indices, indptr = self.entries
        rows = torch.arange(self.n_rows, device=indptr.device)
        if self.per_row is not None:
            return rows[:, None].expand(-1, self.per_row).reshape(-1)
        return torch.repeat_interleave(rows, indptr.diff(), output_size=indices.numel())

    @cached_property
    def transposed(self) -> Transposed:
        """The entries grouped by latent; rows ascend within a latent, so sums over rows have one order."""
        indices = self.entries[0]
        latents, order = sort_narrow(indices, self.d_sae)
        rows = order // self.per_row if self.per_row else self.row_of.take(order)
        return Transposed(order, rows, _offsets(latents, self.d_sae))

    def count(self, mask: Tensor) -> Tensor:
        """(F,) int64: how many entries of each latent a mask (nnz,) marks, or (N, F) for a full pattern."""
        if self.is_full:
            return mask.sum(0)
        indices = self.entries[0]
        if not host_waits(mask):
            return torch.bincount(indices[mask], minlength=self.d_sae)
        return torch.zeros(self.d_sae, dtype=torch.int64, device=mask.device).scatter_add_(0, indices, mask.long())

    def take(self, matrix: Tensor) -> Tensor:
        """Values of matrix (N, F) at the entries: (nnz,), or the matrix itself for a full pattern."""
        if self.is_full:
            return matrix
        indices = self.entries[0]
        if self.per_row:
            return matrix.gather(1, indices.view(self.n_rows, self.per_row)).view(-1)
        return matrix.reshape(-1)[torch.add(indices, self.row_of, alpha=self.d_sae)]


def sort_narrow(numbers: Tensor, stop: int) -> "torch.return_types.sort":
    """Sort integers of [0, stop), stably, as the narrowest type that holds them: two to four times faster."""
    return torch.sort(numbers.to(torch.int16 if stop <= 2**15 else torch.int32), stable=True)


def _offsets(groups: Tensor, n_groups: int) -> Tensor:
    """(n_groups + 1,) int64 where each group's entries start; groups (nnz,) ascending."""
    # Found without a count whose length depends on the data: that would make the host wait for CUDA.
    return torch.searchsorted(groups, steps(-1, n_groups, 1, groups, groups.dtype), right=True)


@dataclass(frozen=True, eq=False)
class Codes:
    """Sparse activations: values (nnz,) on a pattern, or (N, F) when the pattern is full. Gradients flow in values."""

    values: Tensor
    pattern: Pattern

    @classmethod
    def from_dense(cls, acts: Tensor) -> "Codes":
        """Codes of the nonzero entries of acts (N, F)."""
        pattern = Pattern.of_mask(acts != 0)
        return cls(pattern.take(acts), pattern)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, F)."""
        return self.pattern.n_rows, self.pattern.d_sae

    @property
    def indices(self) -> Tensor:
        """(nnz,) latent of each stored entry."""
        if self.pattern.is_full:
            return torch.arange(self.shape[1], device=self.values.device).repeat(self.shape[0])
        return self.pattern.entries[0]

    @property
    def indptr(self) -> Tensor:
        """(N + 1,) where each row's entries start."""
        if self.pattern.is_full:
            n_rows, d_sae = self.shape
            return torch.arange(0, n_rows * d_sae + 1, d_sae, device=self.values.device)
        return self.pattern.entries[1]

    def dense(self) -> Tensor:
        """(N, F) matrix. For tests and small data: everything else works on the entries."""
        if self.pattern.is_full:
            return self.values
        dense = self.values.new_zeros(self.shape)
        return dense.index_put((self.pattern.row_of, self.pattern.entries[0]), self.values, accumulate=True)

    def l0(self) -> float:
        """Mean number of nonzero latents per row."""
        return int((self.values != 0).sum()) / max(self.shape[0], 1)

    def fired(self) -> Tensor:
        """(F,) int64: in how many rows each latent is nonzero."""
        return self.pattern.count(self.values.detach() != 0)

    def keep(self, mask: Tensor) -> "Codes":
        """Only the entries of a mask (nnz,); not for a full pattern."""
        kept = true_entries(mask)
        if kept.numel() == mask.numel():
            return self
        pattern = Pattern.of_rows(self.pattern.row_of[kept], self.indices[kept], *self.shape)
        return Codes(self.values[kept], pattern)

    def rows(self, start: int, stop: int) -> "Codes":
        """The codes of rows start..stop."""
        n_rows = stop - start
        if self.pattern.is_full:
            return Codes(self.values[start:stop], Pattern(n_rows, self.shape[1]))
        indices, indptr = self.pattern.entries
        first, last = int(indptr[start]), int(indptr[stop])
        pattern = Pattern(n_rows, self.shape[1], indices[first:last], indptr[start : stop + 1] - first)
        return Codes(self.values[first:last], pattern)
