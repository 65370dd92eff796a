"""Selections through a product in bfloat16 on a GPU, or in Triton's interpreter on the CPU (`make kernels`)."""

import sys
from collections.abc import Iterator

import pytest
import torch
from sae_kit import new
from torch import Tensor
from triton_kit import DEVICE

from sae_granary.sae_core import Progress
from sae_granary.sae_core.kernels import choose, deferred, gpu_screen, sampled_dot, screen
from sae_granary.sae_core.kernels.deferred import Deferred
from sae_granary.sae_core.kernels.gpu_screen import GpuScreen
from sae_granary.sae_core.kernels.padded import ABSENT
from sae_granary.sae_core.pre_acts import PreActs

N, D, F = (4, 24, 512) if DEVICE == "cpu" else (300, 200, 4096)
KINDS = ["normal", "heavy", "zero_rows", "uneven_latents", "large_bias"]


@pytest.fixture(autouse=True)
def everything_is_screened(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    choose("triton")
    monkeypatch.setattr(gpu_screen, "MIN_ENTRIES", 0)
    if DEVICE == "cpu":  # smaller than the matrices
        monkeypatch.setattr(gpu_screen, "BLOCKS", {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 16, "TOGETHER": 2})
    yield
    choose(None)


def factors(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (N, D), latents (F, D), bias (F,)."""
    generator = torch.Generator().manual_seed(KINDS.index(kind) if kind in KINDS else 99)
    h, W = torch.randn(N, D, generator=generator), torch.randn(F, D, generator=generator)
    bias = torch.randn(F, generator=generator) * (100 if kind == "large_bias" else 0.1)
    if kind == "heavy":
        h *= torch.randn(N, 1, generator=generator).exp()
    if kind == "zero_rows":
        h[::3] = 0.0
    if kind == "uneven_latents":
        W *= torch.randn(F, 1, generator=generator).exp()
    if kind == "near_ties":  # latents that bfloat16 cannot tell apart, one of each in every group
        W = W[:16].repeat(F // 16, 1) * (1 + 1e-4 * torch.randn(F, 1, generator=generator))
    return h.to(DEVICE), W.to(DEVICE), bias.to(DEVICE)


def exact(h: Tensor, W: Tensor, bias: Tensor) -> Tensor:
    return (h.double() @ W.double().t() + bias.double()).float()


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_of_each_row(kind: str) -> None:
    h, W, bias = factors(kind)
    by_magnitude = kind == "uneven_latents"
    columns, values, fits = GpuScreen(h, W, bias).topk(5, by_magnitude=by_magnitude)
    expected = exact(h, W, bias)
    assert fits
    assert all(len(set(row)) == 5 and row == sorted(row) for row in columns.tolist())
    torch.testing.assert_close(values, expected.gather(1, columns), rtol=1e-5, atol=1e-4)
    ranked, found = (expected.abs(), values.abs()) if by_magnitude else (expected, values)
    torch.testing.assert_close(found.sort(descending=True).values, ranked.topk(5).values, rtol=1e-5, atol=1e-4)
    dots = sampled_dot(h, W, torch.arange(0, 5 * N + 1, 5, device=DEVICE), columns.flatten())
    assert torch.equal(values.flatten(), dots + bias[columns.flatten()])


@pytest.mark.parametrize("in_parts", [False, True])
def test_the_largest_of_a_batch(in_parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gpu_screen, "CHUNK_ENTRIES", 128 * F if in_parts and DEVICE == "cuda" else 2**30 * (not in_parts)
    )
    h, W, bias = factors("normal")
    found, expected = GpuScreen(h, W, bias).batch_topk(3), exact(h, W, bias)
    assert found.fits
    assert len(found.values) == int(found.indptr[-1]) == 3 * N
    assert torch.equal(torch.bincount(found.rows, minlength=N), found.indptr.diff())
    torch.testing.assert_close(found.values, expected[found.rows, found.columns], rtol=1e-5, atol=1e-4)
    wanted = expected.flatten().topk(3 * N).values
    torch.testing.assert_close(found.values.sort(descending=True).values, wanted, rtol=1e-5, atol=1e-4)


def test_of_few_positive_entries_the_others_count_for_nothing() -> None:
    h, W, bias = factors("normal")
    bias -= exact(h, W, bias).flatten().topk(4).values[-1]  # three are positive
    found, expected = GpuScreen(h, W, bias).batch_topk(3), exact(h, W, bias)
    n_used, positive = int(found.indptr[-1]), expected > 1e-4
    assert found.fits
    assert positive.sum() == 3
    assert 3 <= n_used <= 3 * N
    got = torch.zeros_like(positive)
    got[found.rows[:n_used], found.columns[:n_used]] = True
    assert got[positive].all()
    assert (found.values[n_used:] == ABSENT).all()
    assert torch.equal(found.rows[n_used:], torch.full_like(found.rows[n_used:], N - 1))
    assert ((found.columns >= 0) & (found.columns < F)).all()


def test_rows_may_take_their_slots_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    h, W, bias = factors("normal")
    found = []
    monkeypatch.setattr(gpu_screen, "CHUNK_ENTRIES", 0)  # one row at a time
    for starts in (range(3), range(3)[::-1]):
        monkeypatch.setattr(GpuScreen, "_starts", starts)
        screened = GpuScreen(h[:3], W[:128], bias[:128])
        found.append([*screened.batch_topk(2), *screened.above(9.0, 32)])
    assert all(part[-1] for part in found)
    assert all(torch.equal(mine, other) for mine, other in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which the interpreter computes with
@pytest.mark.parametrize("broken", ["h", "W", "bias", "product"])
def test_what_nothing_bounds_does_not_fit(broken: str) -> None:
    h, W, bias = factors("normal")
    if broken == "product":
        h *= 1e19
        W *= 1e19
    else:
        {"h": h, "W": W, "bias": bias}[broken].view(-1)[5] = -torch.nan if broken == "W" else torch.nan
    assert not GpuScreen(h, W, bias).topk(2)[2]
    assert not GpuScreen(h, W, bias).above(9.0, 64).fits


@pytest.mark.parametrize("per_latent", [False, True])
def test_entries_above_a_bound(per_latent: bool) -> None:
    h, W, bias = factors("normal")
    bound = torch.linspace(6, 14, F, device=DEVICE) * (D / 24) ** 0.5 if per_latent else 9.0 * (D / 24) ** 0.5
    expected = exact(h, W, bias)
    n_above = int((expected > bound).sum())
    found = GpuScreen(h, W, bias).above(bound, 2 * n_above)
    there = found.values > 0
    mask = torch.zeros_like(expected, dtype=torch.bool)
    mask[found.rows[there], found.columns[there]] = True
    clear = (expected - bound).abs() > 1e-4
    assert found.fits
    assert torch.equal(mask[clear], (expected > bound)[clear])
    assert len(found.values) == 2 * n_above
    for n_slots in (n_above // 4, n_above - 2):  # too few for the candidates, and for what is kept of them
        assert not GpuScreen(h, W, bias).above(bound, n_slots).fits


def test_what_does_not_fit_is_selected_from_the_whole_product() -> None:
    h, W, bias = factors("near_ties")
    pre_acts = PreActs(h, W.t(), bias)
    assert not GpuScreen(h, W, bias).topk(2)[2]
    assert not GpuScreen(h, W, bias).above(float(exact(h, W, bias).flatten().topk(4).values[-1]), 8).fits
    found = pre_acts.topk(2)
    assert pre_acts.is_dense
    torch.testing.assert_close(found.values.view(N, 2).amax(1), exact(h, W, bias).amax(1), rtol=1e-5, atol=1e-4)
    if DEVICE == "cuda":  # NumPy, which the interpreter computes with, warns of NaN
        broken = PreActs(torch.full_like(h, torch.nan), W.t(), bias)
        assert broken.topk(2).values.isnan().all()


@pytest.mark.parametrize(("name", "n_positive"), [("topk", None), ("batchtopk", None), ("batchtopk", 5)])
def test_a_step_has_the_gradients_of_the_dense_one(
    name: str, n_positive: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    outcomes = []
    for least in (0, 2**40):
        monkeypatch.setattr(gpu_screen, "MIN_ENTRIES", least)
        sae = new(name, d_in=8, d_sae=128, k=2).to(DEVICE)
        sae.initialize(x, torch.Generator(device=DEVICE).manual_seed(2))
        if n_positive is not None:  # fewer than are kept
            with torch.no_grad():
                sae.encoder_bias.sub_(sae.pre_acts(sae.encoder_input(x)).dense.flatten().topk(n_positive).values[-1])
        answers = Deferred()
        with answers.of_this_step():
            out = sae.train()(x)
            losses = sae.losses(out, Progress(50, 100))
        torch.stack(list(losses.values())).sum().backward()
        assert out.pre_acts.is_dense == (least > 0)
        assert answers.read(out.recon.sum()).fits
        outcomes.append({**losses, **{n: p.grad for n, p in sae.named_parameters()}})
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["vanilla", "gated", "jumprelu"])
def test_a_step_in_slots_has_the_gradients_of_the_dense_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for key, m in sys.modules.items() if key.startswith("sae_granary.") and hasattr(m, "host_waits")]:
        monkeypatch.setattr(module, "host_waits", lambda tensor: True)
    monkeypatch.setattr(deferred, "MIN_ROOM", 32)
    monkeypatch.setattr(screen, "MAX_CANDIDATES", 1.0)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    outcomes = []
    for least in (0, 2**40):
        monkeypatch.setattr(gpu_screen, "MIN_ENTRIES", least)
        sae = new(name, {"l0_target": 4}, d_in=8, d_sae=128)
        sae = sae.to(DEVICE)
        sae.initialize(x, torch.Generator(device=DEVICE).manual_seed(2))
        if name != "jumprelu":
            with torch.no_grad():
                sae.encoder_bias.sub_(sae.pre_acts(sae.encoder_input(x)).dense.quantile(0.97))
        answers = Deferred()
        answers._last_shares = [0.05]
        with answers.of_this_step():
            out = sae.train()(x)
            losses = sae.losses(out, Progress(50, 100))
        torch.stack(list(losses.values())).sum().backward()
        sae.track(out)
        assert out.pre_acts.is_dense == (least > 0)
        assert not out.codes.pattern.is_full
        assert answers.read(out.recon.sum()).fits
        outcomes.append({**losses, **{n: p.grad for n, p in sae.named_parameters() if p.grad is not None}})
        outcomes[-1] |= {n: buffer.float() for n, buffer in sae.named_buffers()}
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-4, atol=1e-6)
