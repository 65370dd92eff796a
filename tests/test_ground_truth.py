"""The ground-truth benchmark: its worlds are what they claim, its metrics are right on cases done by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.ground_truth import experiment, generators, metrics, suite
from benchmarks.ground_truth.generators import WORLDS, sample

N_ROWS = 20_000
TREE = np.array([-1, 0, 0])  # one parent, two children


def make(name: str, seed: int = 0):
    world = WORLDS[name](np.random.default_rng([seed, 1]))
    return world, sample(world, N_ROWS, np.random.default_rng([seed, 2]))


@pytest.mark.parametrize("name", WORLDS)
def test_rows_are_sparse_sums_of_unit_directions(name: str) -> None:
    world, data = make(name)
    assert np.allclose(np.linalg.norm(world.directions, axis=1), 1)
    assert data.x.dtype == data.activations.dtype == np.float32
    noise = data.x - data.activations @ world.directions
    assert noise.std() == pytest.approx(generators.NOISE_STD, rel=0.02)
    assert (data.activations > 0).sum(1).mean() == pytest.approx(world.k, rel=0.03)
    on = data.activations[data.activations > 0]
    assert on.min() >= generators.MIN_MAGNITUDE
    assert on.mean() == pytest.approx(1, abs=0.02)


def test_a_seed_is_a_world() -> None:
    assert np.array_equal(make("tree", 3)[1].x, make("tree", 3)[1].x)
    assert not np.allclose(make("tree", 3)[0].directions, make("tree", 4)[0].directions)


def test_children_are_exclusive_and_need_their_parent() -> None:
    world, data = make("tree")
    assert world.directions.shape == (20, 20)
    active = data.activations > 0
    for parent in range(4):
        children = active[:, world.parent == parent]
        assert children.shape[1] == 4
        assert children.sum(1).max() == 1
        assert not children[~active[:, parent]].any()
        assert children[active[:, parent]].mean(0) == pytest.approx(generators.CHILD_RATE, abs=0.02)
    assert np.corrcoef(active[:, :4].T)[0, 1:] == pytest.approx(0, abs=0.03)


def test_the_other_worlds_differ_as_they_say() -> None:
    active = {name: make(name)[1].activations > 0 for name in WORLDS}
    counts = active["heterogeneous"].sum(1)
    assert np.bincount(counts)[1:] / N_ROWS == pytest.approx(1 / 15, abs=0.01)
    correlation = np.corrcoef(active["correlated"].T)
    same = np.kron(np.eye(12), np.ones((4, 4))) - np.eye(48) > 0
    assert correlation[same].mean() == pytest.approx(0.5, abs=0.05)
    assert correlation[~same & ~np.eye(48, dtype=bool)].mean() == pytest.approx(0, abs=0.01)
    rates = active["zipfian"].mean(0)
    assert rates[0] / rates[7] == pytest.approx(8, rel=0.15)
    assert make("overcomplete")[0].directions.shape == (128, 64)
    gram = make("orthogonal")[0].directions @ make("orthogonal")[0].directions.T
    assert np.allclose(gram, np.eye(32))


def test_matching_is_one_to_one_and_mcc_its_mean_cosine() -> None:
    directions = np.eye(3)
    W_dec = np.array([[0, 2, 0], [3, 0, 0], [0.6, 0.8, 0], [0, 0, -1]])
    similarity = metrics.cosines(W_dec, directions)
    assert similarity[0] == pytest.approx([0, 1, 0.6, 0])
    latent_of = metrics.match(similarity)
    assert latent_of[:2].tolist() == [1, 0]  # the scale of a row does not matter
    assert latent_of[2] == 2  # an opposite direction is no match
    assert metrics.mcc(similarity, latent_of) == pytest.approx(2 / 3)
    fewer = metrics.match(similarity[:, :2])
    assert fewer.tolist() == [1, 0, -1]
    assert metrics.mcc(similarity[:, :2], fewer) == pytest.approx(2 / 3)


def test_f1_by_hand() -> None:
    active = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]], bool)
    fires = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 0]], bool)
    # Feature 0: one hit of two active and two fired; feature 1: perfect; feature 2 is never active.
    assert metrics.f1(active, fires) == pytest.approx((0.5 + 1.0) / 2)


def test_absorption_by_hand() -> None:
    # Rows: parent and child 1, parent and child 2, parent alone, nothing.
    truth = np.array([[1, 1, 0], [1, 0, 1], [1, 0, 0], [0, 0, 0]], np.float32)
    faithful = truth > 0
    absorbed = faithful.copy()
    absorbed[0, 0] = False  # child 1's latent also writes the parent's direction
    projections = np.array([[1, 1, 0], [1, 0, 1], [1, 0, 0], [0, 0, 0]], np.float32)
    assert metrics.absorption(faithful, faithful, TREE) == 0
    assert metrics.absorption(faithful, absorbed, TREE) == 0.5
    assert metrics.missed_alone(faithful, absorbed, TREE) == 0
    assert metrics.carried(truth, absorbed, projections, TREE) == 0.5
    projections[0, 0] = 0.4  # nothing stands in: the parent is missed, not absorbed
    assert metrics.carried(truth, absorbed, projections, TREE) == 0
    absorbed[2, 0] = False
    assert metrics.missed_alone(faithful, absorbed, TREE) == 1
    without = np.full(3, -1)
    assert np.isnan(metrics.absorption(faithful, absorbed, without))
    assert np.isnan(metrics.missed_alone(faithful, absorbed, without))


def test_shrinkage_by_hand() -> None:
    truth = np.array([[2.0, 0.0], [1.0, 1.0]])
    contribution = np.array([[1.0, 5.0], [0.5, 0.0]])  # a false alarm and a miss do not count
    assert metrics.activation_ratio(truth, contribution) == 0.5
    x = np.array([[3.0, 4.0], [1e-9, 0.0]])
    assert metrics.l2_ratio(x, np.array([[3.0, 0.0], [1.0, 1.0]]), np.array([[True], [False]])) == pytest.approx(0.6)


def test_the_truth_itself_scores_perfectly_through_a_cache(tmp_path: Path) -> None:
    """An SAE set to the true dictionary; then one child takes over its parent's direction."""
    from sae_granary.sae_core.variants.jumprelu import JumpReLUSAE

    world, data = make("tree")
    experiment.write_cache(tmp_path / "cache", world, data, seed=0)
    sae = JumpReLUSAE(JumpReLUSAE.Config(d_in=20, d_sae=20, recipe="tanh", normalize="none", threshold_init=0.15))
    with torch.no_grad():
        sae.W_dec.copy_(torch.from_numpy(world.directions))
        sae.W_enc.copy_(sae.W_dec.t())
    perfect = experiment.measure(sae, tmp_path / "cache", world, data.activations)
    assert perfect["mcc"] == pytest.approx(1)
    assert perfect["f1"] == pytest.approx(1, abs=1e-3)
    assert perfect["activation_ratio"] == pytest.approx(1, abs=1e-3)
    assert perfect["fvu"] < 0.005
    assert (perfect["absorption"], perfect["missed_alone"], perfect["rare"]) == (0, 0, 0)
    with torch.no_grad():
        sae.W_dec[4] += sae.W_dec[0]
        sae.W_enc[:, 0] -= 2 * sae.W_enc[:, 4]  # the parent's latent is silent when child 4 is there
    spoilt = experiment.measure(sae, tmp_path / "cache", world, data.activations)
    assert spoilt["absorption"] == pytest.approx(1 / 16, abs=0.01)
    assert spoilt["carried"] == pytest.approx(spoilt["absorption"], abs=0.01)
    assert spoilt["missed_alone"] == 0


def test_a_cell_runs_and_repeats() -> None:
    cell = suite.Cell("tree", 0, 2000, 10, ("matryoshka",))
    first = suite.run_cell(cell)
    assert first == suite.run_cell(cell)
    text = suite.table("tree", [first, first])
    assert "± 0.000" in text
    assert "absorption" in text
    assert f"matryoshka  {first['matryoshka']['mcc']:.3f}" in suite.per_seed([first], "mcc")


def test_claims_say_when_they_do_not_hold() -> None:
    numbers = {name: {"absorption": value} for name, value in (("matryoshka", 0.2), ("batchtopk", 0.4))}
    assert "DOES NOT HOLD (0.200, 0.400)" in suite.claims({"tree": [numbers]})
    numbers["matryoshka"]["absorption"] = 0.1
    assert "batchtopk's: holds" in suite.claims({"tree": [numbers]})
