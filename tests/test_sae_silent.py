"""Entries of jumprelu just below their threshold: as few sums as possible, equal to storing them all."""

import pytest
import torch
from sae_kit import new

from sae_granary.sae_core import Progress, functional, pre_acts
from sae_granary.sae_core.variants.jumprelu_recipes import RECIPES

D, F, N = 24, 512, 300


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
