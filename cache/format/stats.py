"""Mean, variance and norms of activations: exact in float64, mergeable, the same for any size of batches.

Shapes: N rows, D = d_in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_granary.cache.errors import CorruptCacheError
from sae_granary.cache.format.signed import Fields, to_base64
from sae_granary.cache.format.storage import Array
from sae_granary.common.rows import BlockSums

F64 = npt.NDArray[np.float64]
MASSIVE = 100.0
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of every dimension."""

    n_rows: int
    mean_D: F64
    m2_D: F64
    error_D: F64 | None = None  # sum of (stored - exact)^2, of dtypes whose error is measured

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of rows together (Chan's formula)."""
        n_rows = self.n_rows + other.n_rows
        delta_D = other.mean_D - self.mean_D
        share = other.n_rows / n_rows
        mean_D = self.mean_D + delta_D * share
        m2_D = self.m2_D + other.m2_D + delta_D * delta_D * (self.n_rows * share)
        error_D = None if self.error_D is None or other.error_D is None else self.error_D + other.error_D
        return Moments(n_rows, mean_D, m2_D, error_D)

    @property
    def largest(self) -> float:
        """No value of these rows is larger: the root of the sum of all squares, and 0.1 % for rounding."""
        return 1.001 * float(np.sqrt(self.n_rows * (self.mean_D @ self.mean_D) + self.m2_D.sum()))

    def to_json(self) -> dict[str, Any]:
        """JSON form; the vectors as base64 of little-endian float64, so that no digit is lost."""
        vectors = {"mean": self.mean_D, "m2": self.m2_D, "error": self.error_D}
        return {"n_rows": self.n_rows} | {k: to_base64(v, "<f8") for k, v in vectors.items() if v is not None}


def merge_all(moments: Iterable[Moments]) -> Moments:
    """The moments of all sets of rows together, merged from first to last."""
    return reduce(Moments.merge, moments)


def block_sums(x_ND: Array) -> BlockSums:
    """Sums over a block of rows, those of dimensions from the first row to the last.

    Sums are numpy's own, not BLAS', whose order depends on the number of threads. The squares of stored values are
    exact in float64, so that the cancellation of mean(x^2) - mean(x)^2 costs no digits that matter.
    """
    with np.errstate(invalid="ignore"):  # the caller looks whether they are finite
        exact_ND = x_ND.astype(np.float64)
        sum_D = exact_ND.sum(axis=0)
        np.multiply(exact_ND, exact_ND, out=exact_ND)
        return BlockSums(sum_D, exact_ND.sum(axis=0), exact_ND.sum(axis=1))


def moments_of(sums: BlockSums) -> tuple[Moments, npt.NDArray[np.float32]]:
    """Moments of a block of rows and the norm of each row, from its sums."""
    n_rows = len(sums.square_N)
    mean_D = sums.sum_D / n_rows
    m2_D = np.maximum(sums.square_D - mean_D * mean_D * n_rows, 0.0)
    with np.errstate(over="ignore"):
        norms_N = np.sqrt(sums.square_N).astype(np.float32)
    return Moments(n_rows, mean_D, m2_D, sums.error_D), norms_N


def block_moments(x_ND: Array) -> tuple[Moments, npt.NDArray[np.float32]]:
    """Moments of a block of rows and the norm of each row."""
    return moments_of(block_sums(x_ND))


def parse_moments(fields: Fields) -> Moments:
    """Moments from their JSON form."""
    names = ("mean", "m2", "error") if "error" in fields.body else ("mean", "m2")
    vectors = [fields.vector(name, "<f8") for name in names]
    if len({len(vector) for vector in vectors}) > 1:
        raise CorruptCacheError(f"{fields.where}: {', '.join(names)} differ in length")
    return Moments(fields.integer("n_rows", 1), *vectors)


@dataclass(frozen=True)
class StorageError:
    """Sum of (stored - exact)^2 as a share of the variance (FVU): what storing the rows cost."""

    fvu: float
    fvu_ordinary: float  # the same without the massive dimensions, which would hide the loss of all others
    n_massive: int  # dimensions

    @property
    def worst(self) -> float:
        """The larger of the two."""
        return max(self.fvu, self.fvu_ordinary)

    def __str__(self) -> str:
        if not self.n_massive:
            return f"{self.fvu:.2g}"
        dimensions = "dimension" if self.n_massive == 1 else "dimensions"
        return f"{self.fvu:.2g}, {self.fvu_ordinary:.2g} without {self.n_massive} massive {dimensions}"


def storage_error(moments: Moments) -> StorageError | None:
    """The storage error of rows, or None where it is not measured: dtypes that round each value on its own.

    A dimension is massive if its mean square exceeds 100 times the median one of the dimensions that are not zero.
    """
    if moments.error_D is None:
        return None
    square_D = moments.mean_D**2 + moments.m2_D / moments.n_rows
    massive_D = square_D > MASSIVE * np.median(square_D[square_D > 0]) if square_D.any() else square_D > 0
    return StorageError(
        _ratio(moments.error_D.sum(), moments.m2_D.sum()),
        _ratio(moments.error_D[~massive_D].sum(), moments.m2_D[~massive_D].sum()),
        int(massive_D.sum()),
    )


def _ratio(error: float, total: float) -> float:
    return float(error / total) if total > 0 else float("inf") if error > 0 else 0.0


@dataclass(frozen=True)
class Stats:
    """What is known of the rows of one hook point; mean and variance are exact, quantiles are order statistics."""

    n_rows: int
    mean: F64  # (D,)
    var: F64  # (D,) population variance
    mean_sq_norm: float  # mean of ||x||^2
    norm_quantiles: dict[float, float]
    storage_error: StorageError | None = None

    @property
    def total_variance(self) -> float:
        """Sum of the variances: the mean squared distance of a row from the mean."""
        return float(self.var.sum())


def make_stats(moments: Moments, norm_shards: Callable[[], Iterable[npt.NDArray[np.float32]]]) -> Stats:
    """Statistics from merged moments and the stored row norms, which are asked for twice."""
    var = moments.m2_D / moments.n_rows
    mean_sq_norm = float((var + moments.mean_D**2).sum())
    return Stats(moments.n_rows, moments.mean_D, var, mean_sq_norm, quantiles(norm_shards), storage_error(moments))


def quantiles(shards: Callable[[], Iterable[npt.NDArray[np.float32]]]) -> dict[float, float]:
    """QUANTILES of non-negative floats, exact, in constant memory: the value at rank round(fraction * (n - 1)).

    Non-negative floats sort like their bits: one pass counts the upper 16 bits, a second one the lower 16 bits of the
    bins that a rank falls into.
    """
    upper = np.zeros(1 << 16, dtype=np.int64)
    for norms in shards():
        upper += np.bincount(norms.view(np.uint32) >> 16, minlength=1 << 16)
    below = np.concatenate([[0], np.cumsum(upper)])
    ranks = {fraction: round(fraction * (int(below[-1]) - 1)) for fraction in QUANTILES}
    bins = {fraction: int(np.searchsorted(below, rank, side="right")) - 1 for fraction, rank in ranks.items()}
    lower = {bin_: np.zeros(1 << 16, dtype=np.int64) for bin_ in set(bins.values())}
    for norms in shards():
        bits = norms.view(np.uint32)
        for bin_, counts in lower.items():
            counts += np.bincount(bits[(bits >> 16) == bin_] & 0xFFFF, minlength=1 << 16)
    result = {}
    for fraction, rank in ranks.items():
        inside = np.cumsum(lower[bins[fraction]])
        low = int(np.searchsorted(inside, rank - below[bins[fraction]], side="right"))
        result[fraction] = float(np.uint32((bins[fraction] << 16) | low).view(np.float32))
    return result
