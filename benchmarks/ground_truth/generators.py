"""Synthetic worlds: known directions, known activations, one way each in which real features are unlike the others.

A row is x = sum_i a_i f_i + noise, with unit directions f_i and nonnegative activations a_i, of which few are positive.

Shapes: N rows, D width, F features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]
Sampler = Callable[[np.random.Generator, int], Mask]

NOISE_STD = 0.01  # per coordinate; the share of the variance that no SAE can explain is about 0.1 %
MAGNITUDE_STD = 0.25  # of the activations, around 1
MIN_MAGNITUDE = 0.25
TREE_PARENTS, TREE_CHILDREN = 4, 4
CHILD_RATE = 0.2  # of each child, given its parent; one row in five has the parent alone


@dataclass(frozen=True, eq=False)
class World:
    """A dictionary, the law of which features are active, and what follows from both."""

    name: str
    directions: Floats  # (F, D), unit rows
    sample_active: Sampler
    k: int  # mean number of active features per row
    parent: NDArray[np.int64]  # (F,) the feature without which this one never fires; -1: none

    @property
    def n_features(self) -> int:
        return len(self.directions)


@dataclass(frozen=True, eq=False)
class Sample:
    """Rows and the activations that made them."""

    x: Floats  # (N, D) float32
    activations: Floats  # (N, F) float32


def sample(world: World, n_rows: int, rng: np.random.Generator) -> Sample:
    """Draw rows; magnitudes are normal around 1, cut off below."""
    active = world.sample_active(rng, n_rows)
    magnitudes = np.maximum(rng.normal(1.0, MAGNITUDE_STD, active.shape), MIN_MAGNITUDE)
    activations = (active * magnitudes).astype(np.float32)
    noise = rng.normal(0.0, NOISE_STD, (n_rows, world.directions.shape[1]))
    return Sample((activations @ world.directions + noise).astype(np.float32), activations)


def orthonormal(rng: np.random.Generator, n_features: int, d_in: int) -> Floats:
    """(F, D) rows of a random rotation."""
    q, _ = np.linalg.qr(rng.normal(size=(d_in, d_in)))
    return q[:n_features]


def isotropic(rng: np.random.Generator, n_features: int, d_in: int) -> Floats:
    """(F, D) independent unit rows."""
    rows = rng.normal(size=(n_features, d_in))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def independent(rates: Floats) -> Sampler:
    """Features fire independently, each at its rate (F,)."""
    return lambda rng, n: rng.random((n, len(rates))) < rates


def orthogonal(rng: np.random.Generator) -> World:
    """The easy case: as many orthogonal directions as dimensions, all equally frequent, 4 of 32 per row."""
    return _flat("orthogonal", orthonormal(rng, 32, 32), independent(np.full(32, 4 / 32)), 4)


def overcomplete(rng: np.random.Generator) -> World:
    """Superposition: 128 directions in 64 dimensions, 3 per row."""
    return _flat("overcomplete", isotropic(rng, 128, 64), independent(np.full(128, 3 / 128)), 3)


def tree(rng: np.random.Generator) -> World:
    """4 independent parents, each with 4 children of which at most one fires, and only with its parent; 2 per row."""
    n_features = TREE_PARENTS * (1 + TREE_CHILDREN)
    parent = np.concatenate([np.full(TREE_PARENTS, -1), np.repeat(np.arange(TREE_PARENTS), TREE_CHILDREN)])
    rate = 2 / (TREE_PARENTS * (1 + TREE_CHILDREN * CHILD_RATE))

    def active(rng: np.random.Generator, n: int) -> Mask:
        parents = rng.random((n, TREE_PARENTS)) < rate
        chosen = np.floor(rng.random((n, TREE_PARENTS)) / CHILD_RATE)  # TREE_CHILDREN: none of them
        children = parents[:, :, None] & (chosen[:, :, None] == np.arange(TREE_CHILDREN))
        return np.concatenate([parents, children.reshape(n, -1)], axis=1)

    return World("tree", orthonormal(rng, n_features, n_features), active, 2, parent)


def heterogeneous(rng: np.random.Generator) -> World:
    """Rows differ in how much they hold: the number of active features is uniform on 1 .. 15, 8 of 64 on average."""
    n_features, most = 64, 15

    def active(rng: np.random.Generator, n: int) -> Mask:
        rank = rng.random((n, n_features)).argsort(axis=1).argsort(axis=1)
        return rank < rng.integers(1, most + 1, size=(n, 1))

    return _flat("heterogeneous", orthonormal(rng, n_features, 64), active, (most + 1) // 2)


def correlated(rng: np.random.Generator) -> World:
    """Features come in 12 groups of 4; inside a group firing correlates at about 0.5 (a Gaussian copula at 0.8)."""
    n_groups, size, k, coupling = 12, 4, 4, 0.8
    threshold = NormalDist().inv_cdf(1 - k / (n_groups * size))

    def active(rng: np.random.Generator, n: int) -> Mask:
        shared = np.repeat(rng.normal(size=(n, n_groups)), size, axis=1)
        own = rng.normal(size=shared.shape)
        return np.sqrt(coupling) * shared + np.sqrt(1 - coupling) * own > threshold

    return _flat("correlated", isotropic(rng, n_groups * size, 40), active, k)


def zipfian(rng: np.random.Generator) -> World:
    """Frequencies fall as 1/rank: the commonest of 64 features in every second row, the rarest in one of 130."""
    weights = 1 / np.arange(1, 65)
    k = 2
    return _flat("zipfian", isotropic(rng, 64, 48), independent(k * weights / weights.sum()), k)


def _flat(name: str, directions: Floats, active: Sampler, k: int) -> World:
    return World(name, directions, active, k, np.full(len(directions), -1))


WORLDS: Mapping[str, Callable[[np.random.Generator], World]] = {
    make.__name__: make for make in (orthogonal, overcomplete, tree, heterogeneous, correlated, zipfian)
}
