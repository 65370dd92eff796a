"""What an SAE recovered of a known dictionary. The README defines every number in words.

Shapes: N rows, D width, F features, M latents.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Floats = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]
Indices = NDArray[np.int64]


def cosines(W_dec: Floats, directions: Floats) -> Floats:
    """(F, M) cosine of each true direction (F, D) with each decoder row (M, D)."""
    rows = W_dec / np.maximum(np.linalg.norm(W_dec, axis=1, keepdims=True), 1e-12)
    return directions @ rows.T


def match(similarity: Floats) -> Indices:
    """(F,) the latent of each feature, one to one, with the largest total similarity (F, M); -1 for want of latents."""
    features, latents = linear_sum_assignment(similarity, maximize=True)
    matched = np.full(len(similarity), -1)
    matched[features] = latents
    return matched


def mcc(similarity: Floats, latent_of: Indices) -> float:
    """Mean over features of the cosine with the matched latent; 0 for a feature without one."""
    return float(np.where(latent_of >= 0, similarity[np.arange(len(latent_of)), latent_of], 0.0).mean())


def f1(active: Mask, fires: Mask) -> float:
    """Mean over features of the F1 of `fires` (N, F, the matched latents) as a detector of `active` (N, F).

    Features that are never active in these rows are left out.
    """
    both = (active & fires).sum(0)
    total = active.sum(0) + fires.sum(0)
    seen = active.any(0)
    return float((2 * both[seen] / total[seen]).mean())


def absorption(active: Mask, fires: Mask, parent: Indices) -> float:
    """Share of (row, parent, active child) in which the parent's latent is silent; NaN without parents."""
    together, of = _families(active, parent)
    return _share(together & ~fires[:, of], together)


def carried(activations: Floats, fires: Mask, projections: Floats, parent: Indices) -> float:
    """The part of `absorption` in which other latents reconstruct the parent: share of the rows in which its latent is
    silent and the decoded code's projection (N, F) on its direction is at least half of its true activation.
    """
    together, of = _families(activations > 0, parent)
    stands_in = projections[:, of] >= 0.5 * activations[:, of]
    return _share(together & ~fires[:, of] & stands_in, together)


def missed_alone(active: Mask, fires: Mask, parent: Indices) -> float:
    """Share of (row, active parent) without an active child in which the parent's latent is silent; NaN without."""
    parents = np.unique(parent[parent >= 0])
    with_child = np.stack([active[:, parent == p].any(1) for p in parents], axis=1) if len(parents) else active[:, :0]
    alone = active[:, parents] & ~with_child
    return _share(alone & ~fires[:, parents], alone)


def activation_ratio(activations: Floats, contribution: Floats) -> float:
    """Sum of what matched latents contribute (N, F), over the sum of the true activations (N, F), where both fire."""
    both = (activations > 0) & (contribution > 0)
    return float(contribution[both].sum() / max(activations[both].sum(), 1e-30))


def l2_ratio(x: Floats, x_hat: Floats, active: Mask) -> float:
    """Mean of |x_hat| / |x| over rows in which any feature is active: for the others it is a ratio of noise."""
    rows = active.any(1)
    return float((np.linalg.norm(x_hat[rows], axis=1) / np.linalg.norm(x[rows], axis=1)).mean())


def _families(active: Mask, parent: Indices) -> tuple[Mask, Indices]:
    """(N, C) rows in which each child and its parent are active, and (C,) the children's parents."""
    children = np.flatnonzero(parent >= 0)
    of = parent[children]
    return active[:, children] & active[:, of], of


def _share(part: Mask, whole: Mask) -> float:
    return float(part.sum() / whole.sum()) if whole.any() else float("nan")
