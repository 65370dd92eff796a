"""dictionary_learning 0.1 against ours: reconstruction, loss terms and gradients from the same weights.

Run by `make interop`, in the peers' environment. Where definitions differ the test's docstring says how and why.
"""

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.trainers.trainer import remove_gradient_parallel_to_decoder_directions
from interop_kit import D_IN, D_SAE, TOLERANCE, K, assert_equal_gradients, difference, make, rows, step, total
from torch import Tensor

from sae_granary.sae_core import SAE, Progress
from sae_granary.sae_core.functional import annealed_sparsity

STEP = 3000  # past every warm-up
PARAMETERS = {  # their names -> ours
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec",
    "bias": "b_dec",
    "decoder_bias": "b_dec",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
}


def trainer(cls: Any, weights: SAE, **options: Any) -> Any:
    """A trainer of theirs with our weights."""
    peer = cls(steps=10_000, activation_dim=D_IN, dict_size=D_SAE, layer=0, lm_name="m", device="cpu", **options)
    ours = dict(weights.named_parameters())
    with torch.no_grad():
        for name, parameter in peer.ae.named_parameters():
            value = ours[PARAMETERS.get(name, name)]
            parameter.copy_(value.t() if name.endswith(".weight") else value)
    return peer


def peer_step(peer: Any, x: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """Their forward and backward: the log (x_hat, f, losses) and the gradients by our parameter names."""
    peer.ae.zero_grad()
    log = peer.loss(x, step=STEP, logging=True)
    peer.loss(x, step=STEP).backward()
    grads = {}
    for name, parameter in peer.ae.named_parameters():
        if parameter.grad is not None:
            ours = PARAMETERS.get(name, name)
            grads[ours] = parameter.grad.t() if name.endswith(".weight") else parameter.grad
    return log, grads


def test_vanilla_equals_the_april_update() -> None:
    x, sae = rows(seed=20), make("vanilla", l1_coef=0.7)
    out, losses, grads = step(sae, x)
    log, peer_grads = peer_step(trainer(StandardTrainerAprilUpdate, sae, l1_penalty=0.7), x)
    assert difference(out.x_hat, log.x_hat) < TOLERANCE
    assert difference(losses["mse"], log.losses["mse_loss"]) < TOLERANCE
    assert difference(losses["l1"], 0.7 * log.losses["sparsity_loss"]) < TOLERANCE
    assert_equal_gradients(grads, peer_grads)


def test_vanilla_and_the_standard_trainer_differ_in_the_decoder_norms() -> None:
    """StandardTrainer keeps unit decoder rows and leaves the norms out of the L1 (Towards Monosemanticity). At unit
    rows the losses are equal; our W_dec gradient has the norm's part, along each row, which theirs projects out."""
    x, sae = rows(seed=20), make("vanilla", l1_coef=0.7)
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    _, losses, grads = step(sae, x)
    log, peer_grads = peer_step(trainer(StandardTrainer, sae, l1_penalty=0.7), x)
    assert difference(total(losses), log.losses["loss"]) < TOLERANCE
    ours, theirs = (g - (g * sae.W_dec).sum(1, keepdim=True) * sae.W_dec for g in (grads["W_dec"], peer_grads["W_dec"]))
    assert difference(ours, theirs) < TOLERANCE
    for name in ("W_enc", "b_enc", "b_dec"):
        assert difference(grads[name], peer_grads[name]) < TOLERANCE, name


@pytest.mark.parametrize("name", ["vanilla", "gated"])
def test_p_annealing_has_their_direction_and_keeps_its_size(name: str) -> None:
    """Theirs switches the exponent in steps and multiplies the coefficient, at each switch, by the ratio of the old to
    the new penalty over the last ten batches; ours moves both on every batch. So the penalty keeps the value of plain
    L1 here, and its gradient is that of sum z^p times that ratio. Theirs leaves the decoder norms out."""
    exponent, x = 0.5, rows(seed=20)
    sae = make(name, l1_coef=0.7, p_end=exponent, p_anneal_from=0.0)
    plain = type(sae)(dataclasses.replace(sae.config, p_end=1.0))
    plain.load_state_dict(sae.state_dict())
    out, losses, _ = step(sae, x, Progress(100, 100))
    _, plain_losses, _ = step(plain, x)
    assert difference(losses["l1"], plain_losses["l1"]) < TOLERANCE
    if name == "vanilla":
        z = (out.codes.dense().detach() * sae.W_dec.detach().norm(dim=1)).requires_grad_()
        peer = trainer(PAnnealTrainer, sae, initial_sparsity_penalty=0.7, sparsity_function="Lp^p")
        theirs = 0.7 * peer.lp_norm(z.clamp_min(1e-12), exponent)
        ours = 0.7 * annealed_sparsity(z, exponent) / len(x)
        (grad_theirs,), (grad_ours,) = torch.autograd.grad(theirs, z), torch.autograd.grad(ours, z)
        fired = z > 1e-4
        ratio = float(z.detach().sum() / z.detach()[z > 0].pow(exponent).sum())
        assert difference(grad_ours[fired], ratio * grad_theirs[fired]) < TOLERANCE
        assert not grad_ours[z == 0].any()


def test_gated_equals_gated() -> None:
    """All three terms and all gradients: the auxiliary decoder is a frozen copy in both."""
    x, sae = rows(seed=20), make("gated", l1_coef=0.7)
    out, losses, grads = step(sae, x)
    peer = trainer(GatedSAETrainer, sae, l1_penalty=0.7)
    log, peer_grads = peer_step(peer, x)
    assert difference(out.x_hat, log.x_hat) < TOLERANCE
    assert difference(losses["mse"], log.losses["mse_loss"]) < TOLERANCE
    assert difference(losses["l1"], 0.7 * log.losses["sparsity_loss"]) < TOLERANCE
    assert difference(losses["aux"], log.losses["aux_loss"]) < TOLERANCE
    assert_equal_gradients(grads, peer_grads)


@pytest.mark.parametrize(("name", "cls"), [("topk", TopKTrainer), ("batchtopk", BatchTopKTrainer)])
def test_k_sparse_variants_are_equal(name: str, cls: Any) -> None:
    x, sae = rows(seed=20), make(name)
    out, losses, grads = step(sae, x)
    log, peer_grads = peer_step(trainer(cls, sae, k=K), x)
    assert difference(out.codes.dense(), log.f) < TOLERANCE
    assert difference(losses["mse"], log.losses["l2_loss"]) < TOLERANCE
    assert_equal_gradients(grads, peer_grads)


@pytest.mark.parametrize(("name", "cls"), [("topk", TopKTrainer), ("batchtopk", BatchTopKTrainer)])
def test_auxk_is_theirs_on_the_losss_own_scale(name: str, cls: Any) -> None:
    """The term itself is equal: ReLU'd, divided by the variance of the error. Theirs is added as it is to a sum of
    squares in raw units, so its weight depends on the activations' scale, is not reduced when few latents are dead,
    and trains b_dec through the pre-activations; ours stands on the loss's scale, times min(n_dead/k_aux, 1)."""
    x, sae = rows(seed=20), make(name, auxk_coef=0.5)
    dead = torch.arange(D_SAE) % 16 == 0
    sae.num_tokens_since_fired.zero_()
    sae.num_tokens_since_fired[dead] = sae.config.dead_after_tokens
    out = sae.train()(x)
    sae.zero_grad()
    auxk = sae.losses(out, Progress(99, 100))["auxk"]
    auxk.backward()
    peer = trainer(cls, sae, k=K, auxk_alpha=0.5)
    peer.num_tokens_since_fired[dead] = peer.dead_feature_threshold
    f, *_, post_relu = peer.ae.encode(
        x, use_threshold=False, **({"return_topk": True} if name == "topk" else {"return_active": True})
    )
    peer_auxk = 0.5 * peer.get_auxiliary_loss((x - peer.ae.decode(f)).detach(), post_relu)
    peer.ae.zero_grad()
    peer_auxk.backward()
    unit = float(sae.loss_variance) * int(dead.sum()) / (D_IN // 2)
    assert difference(auxk / unit, peer_auxk) < TOLERANCE
    assert difference(sae.W_dec.grad / unit, peer.ae.decoder.weight.grad.t()) < TOLERANCE
    assert difference(sae.W_enc.grad / unit, peer.ae.encoder.weight.grad.t()) < TOLERANCE
    assert sae.b_dec.grad is None or not sae.b_dec.grad.any()
    assert peer.ae.b_dec.grad.any()


def test_batchtopk_thresholds_are_the_same_average_started_differently() -> None:
    """Both average the smallest kept activation with decay 0.999. Theirs starts at the first one (after 1000 steps)
    and ours is divided by its weight so far: in the first steps theirs is the first value, ours the mean."""
    sae = make("batchtopk")
    peer, smallest = trainer(BatchTopKTrainer, sae, k=K), []
    fresh = type(sae)(sae.config).train()
    fresh.load_state_dict({**sae.state_dict(), **{k: v for k, v in fresh.state_dict().items() if "threshold" in k}})
    with torch.no_grad():
        for seed in range(20):
            fresh.track(fresh(rows(seed=seed)))
            f = peer.ae.encode(rows(seed=seed), use_threshold=False)
            smallest.append(float(f[f > 0].min()))
            peer.update_threshold(f)
    assert float(peer.ae.threshold) == pytest.approx(smallest[0], rel=0.02)
    assert float(fresh.threshold.value) == pytest.approx(sum(smallest) / 20, rel=0.005)


def test_matryoshka_is_theirs_times_the_number_of_groups() -> None:
    """Theirs is the mean over the prefixes, and each is weighted by 1/groups by default on top: 1/groups^2 in all.
    With weights of 1 ours, the sum (arXiv 2503.17547, equation 3), is groups times theirs, gradients too."""
    x, sae = rows(seed=20), make("matryoshka")
    sizes = [end - start for start, end in pairwise((0, *sae.config.prefixes))]
    fractions, n_groups = [size / D_SAE for size in sizes], len(sizes)
    peer = trainer(MatryoshkaBatchTopKTrainer, sae, k=K, group_fractions=fractions, group_weights=[1.0] * n_groups)
    assert peer.group_sizes == sizes
    out, losses, grads = step(sae, x)
    log, peer_grads = peer_step(peer, x)
    assert difference(out.x_hat, log.x_hat) < TOLERANCE
    assert difference(total(losses), n_groups * log.losses["l2_loss"]) < TOLERANCE
    assert_equal_gradients(grads, {name: n_groups * grad for name, grad in peer_grads.items()})


def test_jumprelu_agrees_but_for_the_step_on_the_result() -> None:
    """Values are equal with b_dec = 0 (they do not subtract it from the input). Their L0 steps on the result
    z = p H(p - theta) where the paper steps on p: a pre-activation just under the threshold is 0 there and gives theta
    no gradient, so about half of it is lost (and with a bandwidth above 2 theta every zero would push theta).
    """
    bandwidth, threshold, target, x = 0.2, 0.3, 5.0, rows(seed=20)
    sae = make("jumprelu", recipe="l0_target", l0_target=target, threshold_init=threshold, bandwidth=bandwidth)
    with torch.no_grad():
        sae.b_dec.zero_()
        sae.threshold.fill_(threshold)
    out, losses, grads = step(sae, x)
    peer = trainer(JumpReluTrainer, sae, bandwidth=bandwidth, target_l0=target)
    log, peer_grads = peer_step(peer, x)
    assert difference(out.x_hat, log.recon) < TOLERANCE
    assert difference(losses["mse"], log.losses["l2_loss"]) < TOLERANCE
    assert difference(total(losses), log.losses["loss"]) < TOLERANCE
    for name in ("W_enc", "b_enc", "W_dec"):
        assert difference(grads[name], peer_grads[name]) < TOLERANCE, name

    below = (out.pre_acts.dense <= threshold) & (out.pre_acts.dense > threshold - bandwidth / 2)
    d_loss_d_l0 = 2 * (out.codes.l0() / target - 1) / target
    lost = -d_loss_d_l0 / bandwidth * below.sum(0) / len(x)
    assert lost.any()
    assert difference(grads["threshold"] - lost, peer_grads["threshold"]) < TOLERANCE


def test_decoder_projection_and_geometric_median_are_equal() -> None:
    """Ours iterates in float64; theirs in float32 stops a little earlier or later."""
    x, sae = rows(seed=20), make("topk", b_dec_init="geometric_median")
    step(sae, x)
    peer = trainer(TopKTrainer, sae, k=K)
    peer.loss(x, step=STEP).backward()
    theirs = remove_gradient_parallel_to_decoder_directions(
        peer.ae.decoder.weight, peer.ae.decoder.weight.grad, D_IN, D_SAE
    )
    sae.project_gradients()
    assert difference(sae.W_dec.grad, theirs.t()) < TOLERANCE
    fresh = make("topk")
    fresh.initialize(rows(), torch.Generator().manual_seed(0))
    assert difference(fresh.b_dec, BatchTopKTrainer.geometric_median(rows())) < 1e-4
