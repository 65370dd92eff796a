"""Step and offset of dtypes with a scale per row, fitted to the first rows of a cache, and what storing costs.

Shapes: N rows, D = d_in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from sae_granary.cache.errors import StorageLossError
from sae_granary.cache.format.affine import MAX_OFFSET, MAX_STEP, MIN_STEP, STEP_BITS, Affine, round_up
from sae_granary.cache.format.layout import CacheLayout
from sae_granary.cache.format.stats import F64, Moments, StorageError, block_moments, merge_all, storage_error
from sae_granary.cache.format.storage import Array

MAX_ROWS, MIN_ROWS = 8192, 256
MAX_FVU, WARN_FVU = 1e-3, 1e-4
_CALM = 3.0  # norms above so many medians are attention sinks and the like
_ZEROS = 1 / 8  # a dimension with a larger share of exact zeros has offset 0, so that they stay zeros
_FLOOR = 1 / 8  # of the median step
_BLOCK_ROWS, _BLOCK_WIDTH = 2048, 512


def fit_rows(activations: Mapping[str, Array], layout: CacheLayout) -> tuple[dict[str, Affine], list[str]]:
    """Step and offset of each hook point from the first rows appended, and warnings about what storing them costs.

    Raises StorageLossError for too few rows, and where the storage error is too large.
    """
    affines, warnings = {}, []
    for hook, x_ND in activations.items():
        dtype = layout.activations[hook].storage.name
        if len(x_ND) < MIN_ROWS:
            raise StorageLossError(
                f"{dtype} is fitted to the first rows, at least {MIN_ROWS} at once: there are {len(x_ND)}; "
                "use --dtype bfloat16, or more text"
            )
        affines[hook] = fit(x_ND)
        error = measure(x_ND, affines[hook])
        if error is not None and not error.worst <= MAX_FVU:
            raise StorageLossError(
                f"hook point {hook!r}: {dtype} loses too much: storage FVU {error} on the first {len(x_ND):,} rows, at "
                f"most {MAX_FVU:g} is stored; use --dtype bfloat16"
            )
        if error is not None and error.worst > WARN_FVU:
            warnings.append(f"{hook}: stored as {dtype} with storage FVU {error}; --dtype bfloat16 keeps more")
    return affines, warnings


def drift_warnings(shard: int, statistics: Mapping[str, Moments]) -> list[str]:
    """Hook points of a committed shard that are no longer like the rows that step and offset were fitted to."""
    errors = {hook: storage_error(moments) for hook, moments in statistics.items()}
    return [
        f"{hook}, shard {shard}: storage FVU {error}; its rows are unlike the first ones: use --dtype bfloat16"
        for hook, error in errors.items()
        if error is not None and not error.worst <= MAX_FVU
    ]


def fit(x_ND: Array) -> Affine:
    """Offset: the mean of the rows without outliers. Step: the geometric mean of the deviations with and without them.

    Rows with NaN or Inf are left out: the writer refuses them by name.
    """
    x_ND = x_ND[:MAX_ROWS]
    with np.errstate(over="ignore", invalid="ignore"):
        norms_N = np.sqrt(sum(np.square(x_ND[:, c].astype(np.float64)).sum(axis=1) for c in _columns(x_ND)))
    x_ND, norms_N = x_ND[np.isfinite(norms_N)], norms_N[np.isfinite(norms_N)]
    if not len(x_ND):
        return Affine(np.ones(x_ND.shape[1], np.float32), np.zeros(x_ND.shape[1], np.float32))
    calm_N = norms_N <= _CALM * np.median(norms_N)
    parts = [_fit_columns(x_ND[:, columns].astype(np.float64), calm_N) for columns in _columns(x_ND)]
    offset_D, step_D = (np.concatenate(part) for part in zip(*parts, strict=True))
    if step_D.any():
        step_D = np.maximum(step_D, _FLOOR * np.median(step_D[step_D > 0]))
    else:
        step_D[:] = 1.0
    offset_D = np.where(np.abs(offset_D) < MIN_STEP, 0.0, np.clip(offset_D, -MAX_OFFSET, MAX_OFFSET))
    step_D = np.clip(step_D, MIN_STEP, MAX_STEP * (1 - 2.0**-STEP_BITS))
    return Affine(round_up(step_D.astype(np.float32), STEP_BITS), offset_D.astype(np.float32))


def _fit_columns(x_ND: F64, calm_N: Array) -> tuple[F64, F64]:
    """(D,) offset and step of some dimensions."""
    offset_D, calm_D = x_ND[calm_N].mean(axis=0), x_ND[calm_N].std(axis=0)
    offset_D[(x_ND == 0).mean(axis=0) > _ZEROS] = 0.0
    return offset_D, np.sqrt(calm_D * x_ND.std(axis=0))


def measure(x_ND: Array, affine: Affine) -> StorageError | None:
    """The storage error of rows; None for rows that cannot be stored, which the writer refuses by name."""
    with np.errstate(over="ignore", invalid="ignore"):
        moments = merge_all(_measured(x_ND[i : i + _BLOCK_ROWS], affine) for i in range(0, len(x_ND), _BLOCK_ROWS))
        return storage_error(moments) if np.isfinite(moments.largest) else None


def _measured(x_ND: Array, affine: Affine) -> Moments:
    stored_ND = affine.rounded(x_ND)
    return replace(block_moments(stored_ND)[0], error_D=error_sums(stored_ND, x_ND))


def error_sums(stored_ND: Array, exact_ND: Array) -> F64:
    """(D,) sum of (stored - exact)^2 over rows."""
    difference_ND = stored_ND.astype(np.float64)
    difference_ND -= exact_ND.astype(np.float32, copy=False)
    sums: F64 = np.multiply(difference_ND, difference_ND, out=difference_ND).sum(axis=0)
    return sums


def _columns(x_ND: Array) -> list[slice]:
    return [slice(start, start + _BLOCK_WIDTH) for start in range(0, x_ND.shape[1], _BLOCK_WIDTH)]
