"""Selections and straight-through gradients, against hand-computed numbers and naive references."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_granary.common import device
from sae_granary.sae_core.functional import (
    annealed_sparsity,
    geometric_median,
    jumprelu,
    step,
    support_pattern,
)
from sae_granary.sae_core.kernels import kth_largest, row_topk
from sae_granary.sae_core.latents import EMA_DECAY, BatchThreshold
from sae_granary.sae_core.options import Progress
from sae_granary.sae_core.pre_acts import PreActs


def naive_batch_topk(pre_acts: torch.Tensor, k: int) -> torch.Tensor:
    order = sorted(range(pre_acts.numel()), key=lambda i: (-float(pre_acts.view(-1)[i]), i))
    mask = torch.zeros(pre_acts.numel(), dtype=torch.bool)
    mask[order[: pre_acts.shape[0] * k]] = True
    return mask.view_as(pre_acts) & (pre_acts > 0)


def given_pre_acts(values: torch.Tensor) -> PreActs:
    """Pre-activations that are these values: rows times the identity."""
    return PreActs(values, torch.eye(values.shape[1]), torch.zeros(values.shape[1]))


def mask_of(pattern) -> torch.Tensor:
    mask = torch.zeros(pattern.n_rows, pattern.d_sae, dtype=torch.bool)
    mask[pattern.row_of, pattern.entries[0]] = True
    return mask


@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 12), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_largest_of_each_row_are_found_through_groups(n_rows, n_groups, k, ties, seed) -> None:
    matrix = torch.randn(n_rows, 16 * n_groups, generator=torch.Generator().manual_seed(seed))
    matrix = matrix.mul(2).round() if ties else matrix
    k = min(k, matrix.shape[1])
    columns = row_topk(matrix, k)
    assert all(len(set(row)) == k for row in columns.tolist())
    found = matrix.gather(1, columns).sort(descending=True).values
    assert torch.equal(found, matrix.topk(k).values)


def test_no_rows_have_no_largest_entries() -> None:
    """An evaluation leaves out rows that are not finite: all of a batch may be."""
    assert row_topk(torch.empty(0, 16 * 16), 2).shape == (0, 2)


def test_the_kth_largest_counts_ties() -> None:
    values = torch.tensor([2.0, 5.0, 5.0, -1.0])
    assert [float(kth_largest(values, k)) for k in (1, 2, 3, 4)] == [5.0, 5.0, 2.0, -1.0]


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 70),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 2**16),
    st.sampled_from(["ties", "ragged", "normal"]),
)
def test_batch_topk_is_the_sorted_selection(n: int, m: int, k: int, seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    pre_acts = torch.randn(n, m, generator=generator)
    if kind == "ties":
        pre_acts = pre_acts.round()
    if kind == "ragged":  # a few rows hold nearly all large values, and the sampled rows may miss them
        pre_acts *= torch.where(torch.rand(n, 1, generator=generator) < 0.1, 100.0, 1.0)
    k = min(k, m)
    pattern = given_pre_acts(pre_acts).batch_topk(k).pattern
    assert pattern.entries[0].numel() == min(n * k, int((pre_acts > 0).sum()))
    assert torch.equal(mask_of(pattern), naive_batch_topk(pre_acts, k))


def test_support_is_full_when_it_is_dense() -> None:
    assert support_pattern(torch.ones(4, 4).bool()).is_full
    sparse = torch.zeros(10, 10).bool()
    sparse[3, 4] = True
    assert not support_pattern(sparse).is_full


def test_jumprelu_values_and_pseudo_gradients() -> None:
    # threshold 1, bandwidth 1: the kernel covers 0.5 < p < 1.5.
    p = torch.tensor([[0.2, 0.7, 1.2, 3.0]], requires_grad=True)
    threshold = torch.full((4,), 1.0, requires_grad=True)
    z = jumprelu(p, threshold, 1.0)
    assert z[0].tolist() == pytest.approx([0.0, 0.0, 1.2, 3.0])
    upstream = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    z.backward(upstream)
    assert p.grad is not None
    assert threshold.grad is not None
    assert p.grad.tolist() == [[0.0, 0.0, 100.0, 1000.0]]
    assert threshold.grad.tolist() == [0.0, -10.0, -100.0, 0.0]  # -(theta / eps) K g


def test_jumprelu_scales_the_threshold_gradient_by_theta_over_the_bandwidth() -> None:
    threshold = torch.tensor([0.5], requires_grad=True)
    jumprelu(torch.tensor([[0.45], [0.55], [0.8]]), threshold, 0.2).sum().backward()
    assert threshold.grad is not None
    assert threshold.grad.item() == pytest.approx(-(0.5 / 0.2) * 2)


def test_step_moves_thresholds_only() -> None:
    p = torch.tensor([[0.45, 0.55, 0.8]], requires_grad=True)
    threshold = torch.full((3,), 0.5, requires_grad=True)
    active = step(p, threshold, 0.2)
    assert active.tolist() == [[0.0, 1.0, 1.0]]
    active.sum().backward()
    assert p.grad is None or not p.grad.any()
    assert threshold.grad is not None
    assert threshold.grad.tolist() == pytest.approx([-5.0, -5.0, 0.0])  # -1/eps inside the kernel


def test_geometric_median_ignores_an_outlier() -> None:
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, 0.5], [1000.0, 1000.0]])
    median = geometric_median(rows)
    assert (median - torch.tensor([0.5, 0.5], dtype=torch.float64)).norm() < 0.3
    assert rows.mean(0).norm() > 200


def test_progress_ramps_linearly_and_then_stays() -> None:
    assert [Progress(step, 100).ramp(0.04) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert Progress(0, 100).ramp(0.0) == 1.0


def test_threshold_ema_is_not_biased_towards_its_start() -> None:
    threshold = BatchThreshold()
    assert threshold.value.item() == 0.0
    threshold.update(torch.tensor([3.0, 2.0]))
    assert threshold.value.item() == pytest.approx(2.0)
    threshold.update(torch.tensor([4.0]))
    expected = (EMA_DECAY * (1 - EMA_DECAY) * 2.0 + (1 - EMA_DECAY) * 4.0) / (1 - EMA_DECAY**2)
    assert threshold.value.item() == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_calibration_finds_the_threshold_with_mean_l0_k(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(500, 40, generator=generator) * scale for scale in (0.5, 1.0, 2.0)]
    threshold = BatchThreshold()
    threshold.calibrate(lambda bound: ((len(batch), batch) for batch in batches), k)
    l0 = float((torch.cat(batches) > threshold.value.float()).sum()) / 1500
    assert l0 == pytest.approx(k, rel=0.002)


@pytest.mark.parametrize(("first", "asked"), [(0.8, 3), (1.0, 3), (1.05, 3), (1.3, 4), (5.0, 4)])
def test_entries_far_below_the_threshold_of_the_first_batch_are_counted_if_they_matter(
    first: float, asked: int
) -> None:
    generator, plain, guided, bounds = torch.Generator().manual_seed(0), BatchThreshold(), BatchThreshold(), []
    batches = [torch.randn(500, 40, generator=generator) * scale for scale in (first, 1.0, 1.0, 1.0)]

    def above(bound: float) -> Iterator[tuple[int, torch.Tensor]]:
        bounds.append(bound)
        yield from ((len(batch), batch[batch > bound] if bound else batch) for batch in batches)

    plain.calibrate(above, 3)
    guided.calibrate(above, 3, again=True)
    assert guided.value == plain.value
    assert len(bounds) == asked


def test_calibration_with_too_few_positives_keeps_them_all() -> None:
    threshold = BatchThreshold()
    threshold.calibrate(lambda bound: [(1, torch.tensor([[1.0, -1.0, -1.0]]))], 2)
    assert threshold.value.item() == 0.0


def test_the_threshold_stays_on_the_cpu_where_a_device_lacks_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "NO_FLOAT64", {"meta"})
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), BatchThreshold()).to("meta")
    assert model[0].weight.is_meta
    assert {name: buffer.device.type for name, buffer in model[1].named_buffers()} == dict.fromkeys(
        ("ema", "n_updates", "calibrated"), "cpu"
    )


@pytest.mark.parametrize("stage", ["sae_core", "train"])
def test_float64_is_asked_for_in_one_place(stage: str) -> None:
    """`x.double()` ends in an error on mps; `common.device.float64` moves x first."""
    sources = (Path(__file__).parents[1] / stage).rglob("*.py")
    assert [source.name for source in sources if ".double()" in source.read_text(encoding="utf-8")] == []


def test_annealed_sparsity_keeps_its_size_and_pushes_small_activations_harder() -> None:
    activity = torch.tensor([4.0, 1.0, 0.0], requires_grad=True)
    penalty = annealed_sparsity(activity, 0.5)
    assert float(penalty.detach()) == pytest.approx(5.0)
    penalty.backward()
    # (5 / 3) * 0.5 * f ** -0.5, and nothing for an inactive entry
    assert activity.grad.tolist() == pytest.approx([5 / 3 * 0.25, 5 / 3 * 0.5, 0.0])
    assert float(annealed_sparsity(activity, 1.0).detach()) == 5.0


def test_progress_anneals_after_its_start() -> None:
    values = [Progress(step, 11).anneal(1.0, 0.2, 0.5) for step in range(11)]
    assert values[:6] == [1.0] * 6
    assert values[10] == pytest.approx(0.2)
    assert values[8] == pytest.approx(1.0 - 0.8 * 0.6)
