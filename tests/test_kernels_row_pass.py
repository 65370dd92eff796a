"""The update of the weights in one pass: Triton kernels against torch's optimizer on the CPU (`make kernels`)."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from triton_kit import DEVICE

from benchmarks.cuda_visit import blocks
from benchmarks.cuda_visit.roofline import Size
from sae_granary.sae_core import registry
from sae_granary.sae_core.kernels import choose, triton_bag, triton_rows
from sae_granary.train.config.merge import make_config
from sae_granary.train.loop import StepResult, train_step
from sae_granary.train.optim.optimizers import load_state_tensors, state_tensors
from sae_granary.train.state.run_state import Run, build_sae
from sae_granary.train.step_input import RowInput
from sae_granary.train.sweeps.batched import _Stack

D_IN, D_SAE, N_ROWS, N_STEPS = 20, 16, 6, 2  # d_in: more than a column block


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton_bag, "CHUNK", 16)
    monkeypatch.setattr(triton_bag, "MAX_BLOCK", 4)  # rows of several column blocks; at least 16 are taken
    yield
    choose(None)


def batch(name: str, seed: int, device: str) -> RowInput:
    reads = registry.get(name).reads
    hooks = ["a"] if reads.one_row else ["a", "b"]
    generator = torch.Generator().manual_seed(seed)
    return RowInput({hook: torch.randn(N_ROWS, D_IN, generator=generator).to(device) for hook in hooks})


def make_run(name: str, device: str, **settings: object) -> Run:
    known = registry.get(name).Config.__dataclass_fields__
    options = {option: 2 for option in ("k", "l0_target", "n_hooks") if option in known}
    given = {"type": name, "cache": "c", "steps": 50, "lr": 1e-2, "warmup_steps": 0, "device": device, "d_in": D_IN}
    config = make_config([given, {"compute_dtype": "float32", "d_sae": D_SAE}, options, settings])
    sae = build_sae(config)
    sae.initialize(batch(name, 0, "cpu").rows, torch.Generator().manual_seed(0))
    return Run.create(config, sae)


def outcome(name: str, kernels: str, **settings: object) -> tuple[dict[str, Tensor], list[StepResult], int]:
    """Parameters, buffers and moments after some steps; the steps; how many matrices were updated in one pass."""
    choose(kernels)
    device = DEVICE if kernels == "triton" else "cpu"
    run = make_run(name, device, **settings)
    results = [train_step(run, batch(name, seed, device), measure=True) for seed in range(N_STEPS)]
    state = {**run.sae.state_dict(), **state_tensors(run.optimizer, run.parameter_names)}
    return {key: value.cpu() for key, value in state.items()}, results, len(run.row_pass.matrices)


@pytest.mark.parametrize(("name", "settings", "separate"), [
    ("topk", {"optimizer": "adamw", "weight_decay": 0.1, "grad_clip": 1e-3}, 0),
    ("topk", {"optimizer": "adam", "weight_decay": 0.1, "grad_acc_steps": 2}, 2 * N_STEPS),
    ("batchtopk", {"grad_clip": None, "dead_after_tokens": N_ROWS}, 0),
    ("topk", {"dead_after_tokens": N_ROWS, "k_aux": 1}, 0),
    ("vanilla", {}, None),
    ("jumprelu", {"grad_clip": 1e-3}, None),
    ("route", {}, None),
])  # fmt: skip
def test_a_step_leaves_what_torchs_optimizer_leaves(
    name: str, settings: dict[str, object], separate: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []  # over gradients whose kernel did not give the norm, as when two gradients are added
    squared_norms = triton_rows.squared_norms
    monkeypatch.setattr(triton_rows, "squared_norms", lambda *given: passes.append(1) or squared_norms(*given))
    (expected, theirs, by_torch), (got, ours, own) = (outcome(name, which, **settings) for which in ("eager", "triton"))
    assert len(passes) == separate or separate is None
    assert (by_torch, own) == (0, 2)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.accepted
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
        assert mine.measured is not None
        assert other.measured is not None
        assert mine.measured.grad_norms == pytest.approx(dict(other.measured.grad_norms), rel=1e-4, abs=1e-6)
    assert got.keys() == expected.keys()
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-5, equal_nan=True)


def test_saes_of_a_sweep_that_share_a_pass_leave_what_each_alone_leaves() -> None:
    states = []
    for kernels in ("eager", "triton"):
        choose(kernels)
        device = DEVICE if kernels == "triton" else "cpu"
        runs = [make_run("topk", device, dead_after_tokens=10**9, log_every=100, grad_clip=1e-3) for _ in range(2)]
        for seed in range(2):
            if seed and kernels == "triton":
                _Stack(runs).prepare(batch("topk", seed, device))
                assert all(run.prepared is not None for run in runs)
            for run in runs:
                assert train_step(run, batch("topk", seed, device), measure=not seed).accepted
        states.append({f"{i}/{key}": p.cpu() for i, run in enumerate(runs) for key, p in run.sae.state_dict().items()})
    torch.testing.assert_close(states[1], states[0], rtol=2e-4, atol=2e-5, equal_nan=True)


def test_other_optimizers_update_the_weights_themselves() -> None:
    choose("triton")
    assert not make_run("topk", DEVICE, optimizer="signum").row_pass.matrices
    assert make_run("topk", DEVICE, optimizer="adam").row_pass.matrices


def test_a_resumed_run_counts_its_steps_on() -> None:
    choose("triton")
    runs = [make_run("topk", DEVICE) for _ in range(2)]
    train_step(runs[0], batch("topk", 0, DEVICE))
    runs[1].sae.load_state_dict(runs[0].sae.state_dict())
    saved = {key: value.clone() for key, value in state_tensors(runs[0].optimizer, runs[0].parameter_names).items()}
    load_state_tensors(runs[1].optimizer, runs[1].parameter_names, saved)
    runs[1].step = runs[0].step
    for run in runs:
        train_step(run, batch("topk", 1, DEVICE))
    for key, value in runs[0].sae.state_dict().items():
        assert torch.equal(value.nan_to_num(-1), runs[1].sae.state_dict()[key].nan_to_num(-1)), key


@pytest.mark.parametrize("projects", [False, True])
def test_norms_that_come_with_a_sum_are_those_of_the_sum(projects: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    table, rows = (torch.randn(5, 37, generator=generator).to(DEVICE) for _ in range(2))
    rows /= rows.norm(dim=1, keepdim=True)
    indices, offsets = torch.tensor([0, 3, 3, 1, 2, 4], device=DEVICE), torch.tensor([0, 2, 2, 3, 5, 6], device=DEVICE)
    weights = torch.randn(6, generator=generator).to(DEVICE)
    out, square = triton_bag.bag_sum_and_square(indices, table, offsets, weights, rows if projects else None)
    assert torch.equal(out, triton_bag.bag_sum(indices, table, offsets, weights))
    exact = out.double()
    if projects:
        exact -= (exact * rows).sum(1, keepdim=True) * rows
    assert square.item() == pytest.approx(exact.square().sum().item(), rel=1e-6)
    separate = triton_rows.squared_norms(out, rows if projects else None)
    torch.testing.assert_close(separate, exact.square().sum(1), rtol=1e-5, atol=1e-9)


def test_block_sizes_are_timed_beside_the_present_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = blocks.trials
    monkeypatch.setattr(blocks, "trials", lambda *given: (t._replace(settings=t.settings[:1]) for t in trials(*given)))
    monkeypatch.setattr(blocks, "median_ms", lambda run, device: 1.0)
    lines: list[str] = []
    blocks.measure(Size(16, 64, 2, 8), DEVICE, lines.append)
    rows = [line.split(" | ") for line in lines[3:]]
    assert len(rows) == 12
    assert all(row[1] == "as it is" or row[3].startswith(("yes", "no")) for row in rows), lines


@pytest.mark.parametrize("projects", [False, True])
def test_rows_are_added_and_the_norm_is_that_of_the_sum(projects: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    grad, rows, more = (torch.randn(n, 37, generator=generator).to(DEVICE) for n in (6, 6, 3))
    rows /= rows.norm(dim=1, keepdim=True)
    unit = rows if projects else None
    latents, before = torch.tensor([5, 0, 2], device=DEVICE), triton_rows.squared_norms(grad, unit)
    expected = grad.index_add(0, latents, more)
    grown = triton_rows.add_to_rows(grad, latents, more, unit)
    assert torch.equal(grad, expected)
    after = before.index_add(0, latents, grown)
    torch.testing.assert_close(after, triton_rows.squared_norms(grad, unit), rtol=1e-5, atol=1e-5)
