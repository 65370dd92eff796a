"""Losses and all gradients of a step equal the published formulas, written densely in float64, on awkward codes.

The selection itself is taken over from the codes; that it is the right one is tested beside the selections.
"""

import pytest
import torch
from sae_kit import new
from torch import Tensor

from sae_granary.sae_core import SAE, Progress, SAEOutput, functional, losses, pre_acts
from sae_granary.sae_core.kernels import screen

D, F, N = 24, 256, 96
NOW = Progress(50, 100)
CODES = ["usual", "equal latents", "empty rows", "all dead", "every latent"]
OPTIONS = {"topk": {"k_aux": 3}, "gated": {"l1_warmup": 0.0}, "vanilla": {"l1_warmup": 0.0}}


@pytest.fixture(params=["whole", "screened"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(screen, "pays", lambda h, d_sae: request.param == "screened")
    monkeypatch.setattr(screen, "MAX_CANDIDATES", 1.0)
    monkeypatch.setattr(screen, "CHUNK_ENTRIES", 40 * F)
    for module in (functional, pre_acts, losses):
        monkeypatch.setattr(module, "MAX_SPARSE_DENSITY", 1.0)
    return str(request.param)


def prepared(name: str, kind: str) -> tuple[SAE, Tensor]:
    k = F if kind == "every latent" else 4
    sae = new(name, {"k": k}, d_in=D, d_sae=F, dead_after_tokens=10, **OPTIONS.get(name, {}))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, D, generator=generator)
    sae.initialize(x, generator)
    sae.num_tokens_since_fired[:: 1 if kind == "all dead" else 3] = 100
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        if kind == "equal latents":
            sae.W_enc[:, : F // 2] = sae.W_enc[:, :1]
        if kind == "empty rows":
            largest = sae.pre_acts(sae.encoder_input(x)).dense.amax(1)
            sae.encoder_bias.sub_(1.01 * largest.median())
    return sae.train(), x


def formula(sae: SAE, x: Tensor, out: SAEOutput, p: dict[str, Tensor]) -> Tensor:
    """The sum of the losses from parameters in float64."""
    options = sae.config
    target = x.double() * sae.normalizer.scale.double()
    h, variance = target - p["b_dec"], sae.loss_variance.double()

    def fvu(z: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        return (target - z @ W_dec - b_dec).square().sum(1).mean() / variance

    if sae.type_name == "gated":
        q = h @ p["W_enc"]
        gate = torch.relu(q + p["b_gate"])
        z = torch.relu(q * p["r_mag"].exp() + p["b_mag"]) * (gate > 0)
        frozen = fvu(gate, p["W_dec"].detach(), p["b_dec"].detach())
        l1 = gate.sum() / N / variance
        return fvu(z, p["W_dec"], p["b_dec"]) + options.l1_coef * l1 + frozen
    pre = h @ p["W_enc"] + p["b_enc"]
    if sae.type_name == "vanilla":
        z = torch.relu(pre)
        l1 = (z * p["W_dec"].norm(dim=1)).sum() / N / variance
        return fvu(z, p["W_dec"], p["b_dec"]) + options.l1_coef * l1
    activation = (lambda v: v) if getattr(sae, "signed_codes", False) else torch.relu
    kept = torch.zeros(N, F, dtype=torch.float64)
    kept[out.codes.pattern.row_of, out.codes.indices] = 1.0
    z = activation(pre) * kept
    loss = fvu(z, p["W_dec"], p["b_dec"])
    for end in getattr(options, "prefixes", (F,))[:-1]:
        loss = loss + fvu(z[:, :end], p["W_dec"][:end], p["b_dec"])
    # AuxK
    dead = sae.dead_mask.nonzero().squeeze(1)
    error = (target - z @ p["W_dec"] - p["b_dec"]).detach()
    revived = (target - p["b_dec"].detach()) @ p["W_enc"][:, dead] + p["b_enc"][dead]
    k_aux = options.k_aux or D // 2
    strength = revived.abs() if getattr(sae, "signed_codes", False) else revived
    chosen = torch.zeros_like(revived).scatter_(1, strength.topk(k_aux, dim=1).indices, 1.0)
    missed = (error - (activation(revived) * chosen) @ p["W_dec"][dead]).square().sum(1).mean()
    return loss + options.auxk_coef * missed / (error - error.mean(0)).square().sum(1).mean()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("name", ["topk", "abstopk", "batchtopk", "matryoshka", "gated", "vanilla"])
def test_losses_and_gradients_are_the_formulas(name: str, kind: str) -> None:
    sae, x = prepared(name, kind)
    out = sae(x)
    assert not out.codes.pattern.is_full
    loss = torch.stack(list(sae.losses(out, NOW).values())).sum()
    loss.backward()
    doubles = {n: p.detach().double().requires_grad_() for n, p in sae.named_parameters()}
    expected = formula(sae, x, out, doubles)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for n, parameter in sae.named_parameters():
        wanted = doubles[n].grad
        assert wanted is not None
        error = float((parameter.grad.double() - wanted).norm() / wanted.norm())
        assert error < 1e-5, f"{n}: {error}"
