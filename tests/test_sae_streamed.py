"""A product whose large entries are collected part by part, and jumprelu's silent entries: equal to the dense way."""

import pytest
import torch
from sae_kit import new

from sae_granary.sae_core import PreActs, Progress, functional, pre_acts
from sae_granary.sae_core.kernels import screen, streamed
from sae_granary.sae_core.variants.jumprelu_recipes import RECIPES

D, F, N = 24, 512, 300


def factors(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h, W = torch.randn(N, D, generator=generator), torch.randn(F, D, generator=generator)
    return h, W.t(), torch.randn(F, generator=generator)


@pytest.fixture
def several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "pays", lambda h, d_sae: False)
    monkeypatch.setattr(streamed, "pays", lambda h, d_sae: True)
    monkeypatch.setattr(streamed, "CHUNK_ENTRIES", 64 * F)  # the last part is smaller


@pytest.mark.usefixtures("several_parts")
@pytest.mark.parametrize("bound", [12.0, torch.linspace(9, 14, F)])
def test_entries_above_a_bound_are_those_of_the_whole_product(bound) -> None:
    h, W_enc, bias = factors(0)
    found = PreActs(h, W_enc, bias).support(bound)
    whole = (h @ W_enc).add_(bias)
    rows, latents = (whole > bound).nonzero(as_tuple=True)
    assert len(rows) > 100
    assert torch.equal(found.pattern.row_of, rows)
    assert torch.equal(found.indices, latents)
    assert torch.equal(found.indptr, torch.searchsorted(rows, torch.arange(N + 1)))
    torch.testing.assert_close(found.values, whole[rows, latents], rtol=1e-6, atol=1e-5)


@pytest.mark.usefixtures("several_parts")
def test_no_entry_and_too_many_entries() -> None:
    h, W_enc, bias = factors(1)
    assert PreActs(h, W_enc, bias).support(1e6).values.numel() == 0
    assert streamed.product_above(h, W_enc, bias, 0.0, max_share=0.08) is None
    assert PreActs(h, W_enc, bias).support(0.0).pattern.is_full


def test_small_products_and_other_types_are_kept_whole() -> None:
    assert streamed.pays(torch.zeros(2**12, 4), 2**10)
    assert not streamed.pays(torch.zeros(2**11, 4), 2**10)
    assert not streamed.pays(torch.zeros(2**12, 4, dtype=torch.float64), 2**10)


@pytest.mark.usefixtures("several_parts")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("routed", [False, True])
def test_silent_entries_move_thresholds_as_stored_zeros_do(recipe: str, routed: bool, monkeypatch) -> None:
    outcomes = []
    for most in (0.0, 1.0):  # share of stored entries up to which codes are sparse: never, always
        monkeypatch.setattr(functional, "MAX_SPARSE_DENSITY", most)
        monkeypatch.setattr(pre_acts, "MAX_SPARSE_DENSITY", most)
        options = {"recipe": recipe, "threshold_init": 0.8, "bandwidth": 1.0, "dead_coef": 0.0}
        options = {"base": "jumprelu", "base_options": options, "n_hooks": 2} if routed else options
        sae = new("route" if routed else "jumprelu", d_in=D, d_sae=F, **options)
        first, second = torch.randn(2, N, D, generator=torch.Generator().manual_seed(1))
        x = {"first": first, "second": second} if routed else first
        sae.initialize(x, torch.Generator().manual_seed(2))
        with torch.no_grad():  # rows of other norms than 1, thresholds that differ
            sae.core.W_dec.mul_(torch.linspace(0.5, 2, F)[:, None])
            theta = sae.core.theta + torch.linspace(-0.5, 0.5, F)
            sae.core.latents["threshold"].write(sae.core.threshold, theta)
        out = sae.train()(x)
        assert out.codes.pattern.is_full == (most == 0.0)
        losses = sae.losses(out, Progress(50, 100))
        torch.stack(list(losses.values())).sum().backward()
        sae.track(out)
        counted = {n: b.float() for n, b in sae.named_buffers() if n.endswith(("in_window", "n_active"))}
        grads = {n: p.grad for n, p in sae.named_parameters()}
        outcomes.append({"active": out.codes.l0(), **losses, **counted, **grads})
    dense, sparse = outcomes
    assert sparse.pop("active") == dense.pop("active")
    if RECIPES[recipe].to_input:  # their gradient is each entry's own: they are stored
        assert int((out.codes.values == 0).sum()) > 1000
    else:
        assert int(out.extras["n_silent"].sum()) > 1000
    for key, expected in dense.items():
        assert (sparse[key] - expected).norm() <= 1e-5 * expected.norm(), key
