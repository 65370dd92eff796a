"""One step by its parts: clipping, rejection of NaN, accumulation, schedules, what a run needs to end."""

from dataclasses import replace

import pytest
import torch

from sae_granary.sae_core import Progress, registry
from sae_granary.train.config.merge import make_config
from sae_granary.train.errors import DivergedError
from sae_granary.train.loop import MAX_REJECTED_IN_ROW, check_progress, measures, train_step
from sae_granary.train.optim.optimizers import OPTIMIZERS, Hyperparameters, make_optimizer, set_lr, state_tensors
from sae_granary.train.state.run_state import Run, build_sae
from sae_granary.train.step_input import RowInput

D_IN, D_SAE = 8, 24


def make_run(type="topk", **settings) -> Run:
    defaults = {
        "type": type,
        "cache": "c",
        "steps": 50,
        "batch_size": 32,
        "lr": 1e-2,
        "warmup_steps": 0,
        "d_sae": D_SAE,
    }
    if "k" in registry.get(type).Config.__dataclass_fields__:
        defaults["k"] = 3
    if "l0_target" in registry.get(type).Config.__dataclass_fields__:
        defaults["l0_target"] = 3
    config = make_config([defaults, settings])
    config = replace(config, device="cpu", compute_dtype=settings.get("compute_dtype", "float32"))
    config = replace(config, options={"d_in": D_IN, **config.options})
    sae = build_sae(config)
    sae.initialize(rows(256), torch.Generator().manual_seed(0))
    return Run.create(config, sae)


def rows(n=32, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(16, D_IN, generator=torch.Generator().manual_seed(99))
    active = torch.rand(n, 16, generator=generator) < 0.2
    return (active * torch.rand(n, 16, generator=generator)) @ directions


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.sae.state_dict().items()}


def test_a_step_is_forward_backward_clip_step() -> None:
    run, x = make_run("vanilla", optimizer="sgd", beta1=0, grad_clip=0.5, lr=0.1, matrix_lr_scale=2), rows()
    unit = run.sae.loss_variance  # the clip is for the loss before it is divided by V
    before = {name: p.detach().clone() for name, p in run.sae.named_parameters()}
    out = run.sae(x)
    loss = torch.stack(list(run.sae.losses(out, Progress(0, 50)).values())).sum()
    gradients = torch.autograd.grad(loss, list(run.sae.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert norm * unit > 0.5
    result = train_step(run, RowInput({"x": x}), measure=True)
    assert result.accepted
    assert result.grad_norm == pytest.approx(float(norm))
    assert result.loss == pytest.approx(loss.item())
    for (name, p), g in zip(run.sae.named_parameters(), gradients, strict=True):
        rate = 0.2 if p.ndim == 2 else 0.1
        assert torch.allclose(p, before[name] - rate * g * 0.5 / (norm * unit), atol=1e-6), name


def test_learning_rate_follows_the_schedule() -> None:
    run = make_run(warmup_steps=5, steps=20, lr=0.02)
    rates = []
    for seed in range(20):
        train_step(run, RowInput({"x": rows(32, seed)}))
        assert {g["lr"] for g in run.optimizer.param_groups} == {run.last_lr, 3 * run.last_lr}  # vectors, matrices
        rates.append(run.last_lr)
    assert rates[:5] == pytest.approx([0.004, 0.008, 0.012, 0.016, 0.02])
    assert rates[15] == 0.02
    assert rates[16:] == pytest.approx([0.02, 0.015, 0.01, 0.005])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("type", ["vanilla", "topk", "batchtopk", "jumprelu"])
def test_a_batch_with_nan_changes_nothing(type, value) -> None:
    run = make_run(type)
    train_step(run, RowInput({"x": rows()}))
    before, state = weights(run), {k: v.clone() for k, v in run.optimizer.state[run.sae.W_dec].items()}
    bad = rows(seed=1)
    bad[7, 3] = value
    result = train_step(run, RowInput({"x": bad}), measure=True)
    assert not result.accepted
    assert result.problem == "its rows hold NaN, Inf or values larger than any that was harvested"
    after = weights(run)
    assert all(torch.equal(before[name].nan_to_num(-1), after[name].nan_to_num(-1)) for name in before)
    assert all(torch.equal(run.optimizer.state[run.sae.W_dec][k], v) for k, v in state.items())
    assert (run.step, run.rejected, run.rejected_in_row) == (2, 1, 1)
    assert train_step(run, RowInput({"x": rows(seed=2)})).accepted
    assert (run.rejected, run.rejected_in_row) == (1, 0)


def test_a_gradient_that_overflows_changes_no_weight() -> None:
    run = make_run()
    before = {name: p.detach().clone() for name, p in run.sae.named_parameters()}
    run.sae.W_dec.register_hook(lambda grad: grad * float("inf"))
    result = train_step(run, RowInput({"x": rows()}))
    assert not result.accepted
    assert result.problem == "its rows are sound, but the gradient of W_dec is NaN or Inf"
    assert all(torch.equal(before[name], p) for name, p in run.sae.named_parameters())


@pytest.mark.parametrize("type", ["vanilla", "topk", "abstopk", "jumprelu", "gated", "matching_pursuit"])
def test_accumulation_equals_one_batch(type) -> None:
    # Clipping included; Adam would turn rounding of tiny gradients into full steps, so sgd.
    whole = make_run(type, optimizer="sgd", lr=0.1)
    parts = make_run(type, optimizer="sgd", lr=0.1, grad_acc_steps=4)
    for seed in range(5):
        one = train_step(whole, RowInput({"x": rows(32, seed)}), measure=True)
        four = train_step(parts, RowInput({"x": rows(32, seed)}), measure=True)
        assert four.loss == pytest.approx(one.loss, rel=1e-5)
        assert four.metrics == pytest.approx(one.metrics, rel=1e-5)
    theirs = weights(parts)
    for name, value in weights(whole).items():
        if name != "num_tokens_since_fired":  # counted micro-batch by micro-batch
            assert torch.allclose(value.nan_to_num(-1.0), theirs[name].nan_to_num(-1.0), atol=1e-6), name


def test_a_kernel_that_gives_nan_is_told_from_damaged_rows() -> None:
    run = make_run()
    run.sae.reconstruct = lambda codes: torch.full((codes.shape[0], 8), float("nan"), requires_grad=True)
    result = train_step(run, RowInput({"x": rows()}))
    assert not result.accepted
    assert result.problem == "its rows are sound, but the loss is NaN or Inf"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_train(optimizer) -> None:
    run = make_run(optimizer=optimizer, lr=0.1 if optimizer == "sgd" else 0.01, weight_decay=0.01)
    losses = [train_step(run, RowInput({"x": rows(64, seed)}), measure=True).loss for seed in range(30)]
    assert losses[-1] < losses[0]
    assert (run.step, run.tokens, run.rejected) == (30, 30 * 64, 0)


def test_muon_steps_matrices_orthogonally_and_vectors_as_adam_does() -> None:
    run, adam = (make_run("vanilla", optimizer=o, grad_clip=None, matrix_lr_scale=1) for o in ("muon", "adam"))
    before = run.sae.W_dec.detach().clone()
    for r in (run, adam):
        train_step(r, RowInput({"x": rows()}))
    assert torch.allclose(run.sae.b_enc, adam.sae.b_enc, atol=1e-7)
    # Newton-Schulz leaves singular values near 1; the step is 0.2 sqrt(24) of that times the rate.
    values = torch.linalg.svdvals(run.sae.W_dec.detach() - before) / (0.2 * 24**0.5 * 0.01)
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_signum_steps_by_the_sign_of_the_momentum() -> None:
    from sae_granary.train.optim.signum import Signum

    p = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = Signum([p], lr=0.1, momentum=0.9, weight_decay=0.5)
    for gradient in ([4.0, -1.0], [-1.0, -1.0]):  # the momentum of the first is 0.4, then 0.26: still positive
        p.grad = torch.tensor(gradient)
        optimizer.step()
    # 1 * 0.95 -+ 0.1, twice
    assert p.tolist() == pytest.approx([(0.95 - 0.1) * 0.95 - 0.1, (0.95 + 0.1) * 0.95 + 0.1])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_capacity_knows_what_an_optimizer_keeps(optimizer) -> None:
    run = make_run(optimizer=optimizer)
    train_step(run, RowInput({"x": rows()}))
    kept = sum(v.numel() for v in state_tensors(run.optimizer, run.parameter_names).values())
    n_parameters = sum(p.numel() for p in run.sae.parameters())
    assert OPTIMIZERS[optimizer].on_disk - 1 == round(kept / n_parameters)


@pytest.mark.parametrize("type", ["vanilla", "topk", "batchtopk", "jumprelu", "gated", "matryoshka"])
def test_bfloat16_products_change_little(type) -> None:
    exact, rough = make_run(type), make_run(type, compute_dtype="bfloat16")
    for seed in range(5):
        a, b = (train_step(run, RowInput({"x": rows(64, seed)}), measure=True) for run in (exact, rough))
        assert b.loss == pytest.approx(a.loss, rel=0.05)
    assert all(p.dtype == torch.float32 for p in rough.sae.parameters())
    assert any(not torch.equal(v, weights(rough)[n]) for n, v in weights(exact).items())


def test_some_steps_are_measured() -> None:
    run = make_run(steps=12, log_every=5)
    measured = []
    for step in range(1, 13):
        if measures(run):
            measured.append(step)
        train_step(run, RowInput({"x": rows(32, step)}))
    assert measured == [1, 5, 10, 12]


def test_nan_that_repeats_is_an_error() -> None:
    run = make_run()
    bad = torch.full((32, D_IN), float("nan"))
    for _ in range(MAX_REJECTED_IN_ROW):
        check_progress(run)
        train_step(run, RowInput({"x": bad}))
    with pytest.raises(DivergedError, match=rf"{MAX_REJECTED_IN_ROW} batches in a row up to step 10 .*--lr"):
        check_progress(run)


def test_a_rejected_batch_leaves_weights_counters_and_thresholds_as_they_were() -> None:
    run = make_run("batchtopk", grad_acc_steps=2)
    train_step(run, RowInput({"x": rows()}))
    before, bad = weights(run), rows(seed=1)
    bad[-1, 0] = float("nan")  # in the second micro-batch: the first has been tracked by then
    assert not train_step(run, RowInput({"x": bad})).accepted
    for name, value in weights(run).items():
        assert torch.equal(value.nan_to_num(-1.0), before[name].nan_to_num(-1.0)), name


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_matrix_stored_by_columns_steps_as_one_stored_by_rows(optimizer) -> None:
    config = make_config([{"type": "topk", "optimizer": optimizer, "lr": 0.01, "weight_decay": 0.1}])
    by_columns = torch.nn.Parameter(torch.randn(64, 24, generator=torch.Generator().manual_seed(0)).t())
    by_rows = torch.nn.Parameter(by_columns.detach().clone(memory_format=torch.contiguous_format))
    optimizers = [(p, make_optimizer([p], config.optimizer, Hyperparameters.of(config))) for p in (by_columns, by_rows)]
    for seed in range(3):
        for p, optimizer in optimizers:
            (p @ torch.randn(64, 3, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
            set_lr(optimizer, 0.01)
            optimizer.step()
            optimizer.zero_grad()
    assert torch.allclose(by_columns, by_rows, atol=1e-7)
    assert by_columns.shape == (24, 64)
    moment = optimizers[0][1].state[by_columns]["exp_avg"]
    assert (moment.shape, moment.stride()) == (by_columns.shape, by_columns.stride())
