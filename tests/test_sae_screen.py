"""Selecting through a product in bfloat16 gives what the exact product gives, on any processor and any rows.

Small batches are never screened on their own account: the tests ask for it.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_kit import new

from sae_granary.sae_core import Progress
from sae_granary.sae_core.kernels import screen
from sae_granary.sae_core.kernels.select import at_least, group_maxima
from sae_granary.sae_core.pre_acts import PreActs

D, F = 24, 512
KINDS = ["normal", "heavy", "near_ties", "zero_rows", "uneven_latents", "large_bias"]


@pytest.fixture
def always_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "pays", lambda h, d_sae: True)
    monkeypatch.setattr(screen, "MAX_CANDIDATES", 1.0)
    monkeypatch.setattr(screen, "CHUNK_ENTRIES", 128 * F)  # several chunks in a small batch


def factors(kind: str, n_rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows (N, D), W_enc (D, F) with latents contiguous, bias (F,)."""
    generator = torch.Generator().manual_seed(seed)
    h, W = torch.randn(n_rows, D, generator=generator), torch.randn(F, D, generator=generator)
    bias = 0.1 * torch.randn(F, generator=generator)
    if kind == "heavy":
        h *= torch.randn(n_rows, 1, generator=generator).exp() ** 3
    if kind == "near_ties":  # latents that bfloat16 cannot tell apart
        W = W[:8].repeat(F // 8, 1) * (1 + 1e-4 * torch.randn(F, 1, generator=generator))
        bias.zero_()
    if kind == "zero_rows":
        h[::3] = 0.0
    if kind == "uneven_latents":
        W *= torch.randn(F, 1, generator=generator).exp()
    if kind == "large_bias":
        bias = 100 * torch.randn(F, generator=generator)
    return h, W.t(), bias


def group_of(n_columns: int) -> torch.Tensor:
    """(F,) the group of each column, found by marking one column at a time."""
    return group_maxima(torch.eye(n_columns)).argmax(1)


def check_same_selection(found, values: torch.Tensor, expected: torch.Tensor) -> None:
    """`expected` masks the (N, F) of `values`; what differs may differ by rounding only."""
    mask = torch.zeros_like(expected)
    mask[found.pattern.row_of, found.indices] = True
    assert len(found.indices) == int(mask.sum()), "an entry is kept twice"
    torch.testing.assert_close(found.values, values[found.pattern.row_of, found.indices], rtol=1e-5, atol=1e-5)
    swapped = values[mask != expected]
    if swapped.numel():
        rows = (mask != expected).nonzero()[:, 0]
        for row in rows.unique():
            differing = values[row][(mask != expected)[row]]
            assert float(differing.max() - differing.min()) <= 1e-4 * (1 + float(differing.abs().max()))


@pytest.mark.usefixtures("always_screen")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_magnitude", [False, True])
@pytest.mark.parametrize("k", [1, 5, 32])
def test_topk_of_each_row(kind: str, by_magnitude: bool, k: int) -> None:
    h, W_enc, bias = factors(kind, 300, seed=k)
    pre_acts = PreActs(h, W_enc, bias)
    found = pre_acts.topk(k, by_magnitude=by_magnitude)
    assert not pre_acts.is_dense, "the whole product was taken"
    values = (h.double() @ W_enc.double() + bias.double()).float()
    ranked = values.abs() if by_magnitude else values
    expected = torch.zeros(300, F, dtype=torch.bool).scatter_(1, ranked.topk(k, dim=1).indices, True)
    if kind != "zero_rows":
        check_same_selection(found, values, expected)
    torch.testing.assert_close(
        (found.values.abs() if by_magnitude else found.values).view(300, k).sort(descending=True).values,
        ranked.topk(k, dim=1).values,
        rtol=1e-5,
        atol=1e-4,
    )


@pytest.mark.usefixtures("always_screen")
@pytest.mark.parametrize("kind", KINDS)
def test_batch_topk_and_bounds(kind: str) -> None:
    h, W_enc, bias = factors(kind, 300, seed=3)
    values = (h.double() @ W_enc.double() + bias.double()).float()
    found = PreActs(h, W_enc, bias).batch_topk(4)
    kept = values.flatten().clamp_min(0).topk(1200).values
    expected_sum = float(kept.double().sum())
    assert found.values.numel() == min(1200, int((values > 0).sum()))
    assert float(found.values.double().sum()) == pytest.approx(expected_sum, rel=1e-5)
    per_latent = torch.linspace(-1, 3, F)
    for bound in (0.0, 1.5, per_latent):
        above = PreActs(h, W_enc, bias).above(bound)
        clear = (values - bound).abs() > 1e-4 * values.abs().clamp_min(1)  # not decided by rounding
        mask = torch.zeros(300, F, dtype=torch.bool)
        mask[above.pattern.row_of, above.indices] = True
        assert torch.equal(mask[clear], (values > bound)[clear])


@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_the_slack_covers_what_rounding_moves(seed: int, kind: str, n_rows: int) -> None:
    h, W_enc, bias = factors(kind, n_rows, seed)
    screened = screen.screen(h, W_enc.t(), bias)
    exact = h.double() @ W_enc.double() + bias.double()
    summed = screened.rows.double() @ screened.latents.double().t()  # of rounded factors, but not rounded itself
    slack = screened.slack(0, n_rows)[:, group_of(F)]
    assert bool(((exact - summed).abs() <= slack.double()).all())
    ((approximate, _, _),) = screened.chunks()
    room = slack + approximate.float().abs() * screen.BFLOAT16_ROUNDING
    assert bool(((exact - approximate.double()).abs() <= room.double() * (1 + 1e-6)).all())


@pytest.mark.usefixtures("always_screen")
@pytest.mark.parametrize("scale", [1e-24, 1e25])
def test_rows_whose_squares_leave_float32(scale: float) -> None:
    h, W_enc, bias = factors("uneven_latents", 300, seed=5)
    W_enc = W_enc.masked_fill(group_of(F) == 3, 0.0)  # here the bias alone decides
    bias = bias + 5.0 * (group_of(F) == 3)
    values = (h.double() @ W_enc.double() + bias.double()).float()
    tied = (values.abs() - 3.0).abs() < 1e-4
    found = PreActs(h * scale, W_enc, bias * scale).above(3.0 * scale).dense()
    assert torch.equal((found > 0)[~tied], (values > 3.0)[~tied])
    largest = PreActs(h * scale, W_enc, bias * scale).topk(5).values.view(300, 5).sort(descending=True).values
    torch.testing.assert_close(largest / scale, values.topk(5, dim=1).values, rtol=1e-5, atol=1e-5)


def test_too_many_candidates_or_rows_that_are_not_finite_take_the_whole_product(monkeypatch) -> None:
    monkeypatch.setattr(screen, "pays", lambda h, d_sae: True)
    h, W_enc, bias = factors("near_ties", 300, seed=0)
    assert screen.topk_candidates(screen.screen(h, W_enc.t(), bias), 5) is None
    assert screen.candidates_above(screen.screen(h, W_enc.t(), bias), -10.0) is None
    broken = PreActs(torch.cat([h, torch.full((1, D), torch.nan)]), W_enc, bias)
    assert broken.topk(5).values.isnan().sum() == 5
    assert broken.is_dense


def test_small_batches_other_types_and_odd_widths_are_not_screened() -> None:
    large = torch.zeros(2**13, 4)
    assert not screen.pays(large[:64], 512)
    assert not screen.pays(large.double(), 4096)
    assert not screen.pays(large, 4097)


@given(st.integers(1, 5), st.sampled_from([16, 48, 2048, 4096]), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_entries_that_reach_their_rows_bound(n_rows: int, n_columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n_rows, n_columns, generator=generator).bfloat16()
    maxima = group_maxima(matrix)
    bounds = (0.01 + 2 * torch.rand(maxima.shape, generator=generator)).bfloat16()
    bounds[0] = matrix[0].max()  # a bound that is met exactly
    expected = (matrix >= bounds[:, group_of(n_columns)]).flatten().nonzero().squeeze(1)
    assert torch.equal(at_least(matrix, maxima, bounds, matrix.numel()).sort().values, expected)
    integers = matrix.view(torch.int16)  # compare like the numbers, for positive bounds
    found = at_least(integers, group_maxima(integers), bounds.view(torch.int16), matrix.numel())
    assert torch.equal(found.sort().values, expected)
    assert at_least(matrix, maxima, torch.full_like(bounds, -100.0), n_most=0) is None


@pytest.mark.parametrize("name", ["topk", "abstopk", "batchtopk", "matryoshka", "vanilla", "jumprelu", "gated"])
def test_a_step_has_the_gradients_of_the_unscreened_one(name: str, monkeypatch) -> None:
    outcomes = []
    for screened in (False, True):
        monkeypatch.setattr(screen, "pays", lambda h, d_sae, screened=screened: screened)
        monkeypatch.setattr(screen, "MAX_CANDIDATES", 1.0)
        sae = new(name, {"k": 4}, d_in=D, d_sae=F, dead_after_tokens=10)
        x = torch.randn(200, D, generator=torch.Generator().manual_seed(1))
        sae.initialize(x, torch.Generator().manual_seed(2))
        sae.num_tokens_since_fired[::3] = 100
        if not hasattr(sae.config, "k"):
            with torch.no_grad():
                sae.encoder_bias.sub_(1.5 * float(sae.pre_acts(sae.encoder_input(x)).dense.std()))
        losses = sae.train().losses(sae(x), Progress(50, 100))
        torch.stack(list(losses.values())).sum().backward()
        outcomes.append({**losses, **{n: p.grad for n, p in sae.named_parameters()}})
    for key, expected in outcomes[0].items():
        torch.testing.assert_close(
            outcomes[1][key], expected, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}"
        )
