"""SAELens 6.54 against ours: files both ways, and reconstruction, loss terms and gradients from the same weights.

Run by `make interop`, in the peers' environment. Where definitions differ the test's docstring says how and why.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from interop_kit import D_IN, D_SAE, TOLERANCE, K, assert_equal_gradients, difference, make, rows, step
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from sae_granary import sae_core
from sae_granary.sae_core import SAE
from sae_granary.sae_core.errors import NotAnSAEError
from sae_granary.sae_core.variants.jumprelu_recipes import RECIPES

EXPORTED = ["vanilla", "topk", "batchtopk", "jumprelu", "gated", "matryoshka", "abstopk"]
NORMALIZATIONS = ["none", "dataset", "mean", "mean+dataset", "unit_norm"]
TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {  # ours or theirs in lower case -> their name, what it needs
    "standard": ("Standard", {}),
    "gated": ("Gated", {}),
    "jumprelu": ("JumpReLU", {}),
    "topk": ("TopK", {"k": K}),
    "abstopk": ("AbsTopK", {"k": K}),
    "batchtopk": ("BatchTopK", {"k": K}),
    "matryoshka": ("MatryoshkaBatchTopK", {"k": K, "matryoshka_widths": [3, 9, 21, 45, D_SAE]}),
}


def training_sae(name: str, **options: Any) -> Any:
    """A training SAE of theirs: `<name>TrainingSAE`."""
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=D_IN, d_sae=D_SAE, **options)
    return getattr(sae_lens, f"{name}TrainingSAE")(config)


def lens(kind: str, weights: SAE | None = None, **options: Any) -> Any:
    """A training SAE of theirs, with our weights if given."""
    name, needed = TRAINERS[kind]
    sae = training_sae(name, **needed, **options)
    if weights is not None:
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                parameter.copy_(dict(weights.named_parameters())[name])
    return sae


def lens_step(
    sae: Any, x: Tensor, dead: Tensor | None = None, **coefficients: float
) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """Their forward and backward: the output, the loss terms and the gradients by parameter name."""
    out = sae.training_forward_pass(TrainStepInput(x, coefficients, dead, n_training_steps=0, is_logging_step=False))
    out.loss.backward()
    grads = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
    return out, {name: value.detach() for name, value in out.losses.items()}, grads


# -- our files in SAELens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("name", [*EXPORTED, "matching_pursuit"])
def test_our_export_encodes_and_decodes_the_same_in_saelens(name: str, normalize: str, tmp_path: Path) -> None:
    sae = make(name, normalize=normalize).eval()
    sae_core.save(sae, tmp_path)
    theirs, loaded, x = sae_lens.SAE.load_from_disk(tmp_path), sae_core.load(tmp_path), rows(seed=50)
    with torch.no_grad():
        acts = theirs.encode(x)
        assert difference(loaded.encode(x).dense(), acts) < TOLERANCE
        assert difference(sae(x).x_hat, theirs.decode(acts)) < TOLERANCE
        assert difference(loaded(x).x_hat, theirs(x)) < TOLERANCE
    assert float((acts != 0).sum(1).double().mean()) == pytest.approx(sae.encode(x).l0(), abs=0.05)


@pytest.mark.parametrize("recipe", RECIPES)
def test_jumprelu_of_every_recipe_has_equal_codes_in_saelens(recipe: str, tmp_path: Path) -> None:
    sae, x = make("jumprelu", recipe=recipe, normalize="mean+dataset").eval(), rows(seed=50)
    sae_core.save(sae, tmp_path)
    theirs, loaded = sae_lens.SAE.load_from_disk(tmp_path), sae_core.load(tmp_path)
    with torch.no_grad():
        acts, ours = theirs.encode(x), loaded.encode(x).dense()
    assert torch.equal(acts != 0, ours != 0)
    assert torch.equal(acts != 0, sae.encode(x).dense() != 0)
    assert difference(ours, acts) < TOLERANCE


@pytest.mark.parametrize("name", EXPORTED)
def test_rows_of_a_small_scale_decode_the_same_in_saelens(name: str, tmp_path: Path) -> None:
    """`layer_norm` divides by std + 1e-5 and undoes with std: at a std of 0.01 that shows."""
    sae = make(name, normalize="unit_norm").eval()
    sae_core.save(sae, tmp_path)
    x = 0.003 * rows(seed=50)
    with torch.no_grad():
        assert difference(sae(x).x_hat, sae_lens.SAE.load_from_disk(tmp_path)(x)) < TOLERANCE


@pytest.mark.parametrize("name", EXPORTED)
def test_our_metadata_survives(name: str, tmp_path: Path) -> None:
    metadata = {
        "model_name": "sentence-transformers/all-MiniLM-L6-v2",
        "hook_name": "blocks.3.hook_resid_post",
        "hf_hook_name": "encoder.layer.3",
    }
    sae_core.save(make(name), tmp_path, metadata)
    read = sae_lens.SAE.load_from_disk(tmp_path).cfg.metadata
    assert {key: read[key] for key in metadata} == metadata
    assert read.sae_lens_version.startswith("6.")


# -- SAELens' files here ---------------------------------------------------------------------------------------


def randomize(sae: Any) -> Any:
    """Weights that no convention leaves unnoticed: biases, gains and decoder norms away from 0 and 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.rand(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise if name == "W_dec" else 0.3 * (noise - 0.5))
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.8)
        if hasattr(sae, "threshold"):
            sae.threshold.abs_()
    return sae


LENS_OPTIONS: list[dict[str, Any]] = [
    {},
    {"apply_b_dec_to_input": False},
    {"normalize_activations": "layer_norm"},
    {"normalize_activations": "layer_norm", "apply_b_dec_to_input": False},
]


@pytest.mark.parametrize("options", LENS_OPTIONS, ids=str)
@pytest.mark.parametrize("kind", TRAINERS)
def test_a_saelens_folder_encodes_and_decodes_the_same_here(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    randomize(lens(kind, **options)).save_inference_model(tmp_path)
    theirs, ours, x = sae_lens.SAE.load_from_disk(tmp_path), sae_core.load(tmp_path), rows(seed=50)
    with torch.no_grad():
        acts = theirs.encode(x)
        assert 0 < float((acts != 0).double().mean()) < 1
        assert difference(ours.encode(x).dense(), acts) < TOLERANCE
        assert difference(ours(x).x_hat, theirs.decode(acts)) < TOLERANCE


def test_a_bfloat16_jumprelu_of_saelens_loads_with_its_float32_threshold(tmp_path: Path) -> None:
    sae = lens("jumprelu", dtype="bfloat16", jumprelu_init_threshold=0.3)
    sae.save_inference_model(str(tmp_path))
    ours, exact = sae_core.load(tmp_path), sae.float()
    x = rows().bfloat16().float()  # SAELens rounds its input
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x).dense(), exact.encode(x))


def test_decoder_norms_outside_a_saelens_topk_are_folded(tmp_path: Path) -> None:
    """save_model of an inference topk leaves rescale_acts_by_decoder_norm to the reader."""
    training = randomize(lens("topk"))
    training.save_inference_model(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    theirs.W_dec.data *= torch.rand(D_SAE, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    assert theirs.cfg.rescale_acts_by_decoder_norm
    theirs.save_model(tmp_path)
    ours, x = sae_core.load(tmp_path), rows(seed=50)
    with torch.no_grad():
        assert difference(ours.encode(x).dense(), theirs.encode(x)) < TOLERANCE
        assert difference(ours(x).x_hat, theirs(x)) < TOLERANCE


@pytest.mark.parametrize("kind", ["standard", "topk"])
def test_a_folder_from_before_saelens_6_is_read_as_saelens_reads_it(kind: str, tmp_path: Path) -> None:
    """Then, top-k was an activation function of the standard architecture, and nothing stood in `metadata`."""
    randomize(lens(kind)).save_inference_model(tmp_path)
    activation = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}} if kind == "topk" else {}
    old = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "hook_point": "blocks.3.hook_resid_post", **activation}
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    theirs, ours, x = sae_lens.SAE.load_from_disk(tmp_path), sae_core.load(tmp_path), rows(seed=50)
    with torch.no_grad():
        assert difference(ours.encode(x).dense(), theirs.encode(x)) < TOLERANCE
        assert difference(ours(x).x_hat, theirs(x)) < TOLERANCE


def test_a_saelens_folder_that_needs_its_trainer_is_refused(tmp_path: Path) -> None:
    """`expected_average_only_in` means a factor that stands in the trainer's state and not in the folder."""
    lens("standard").save_inference_model(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "normalize_activations": "expected_average_only_in"}))
    with pytest.raises(NotAnSAEError, match="expected_average_only_in"):
        sae_core.load(tmp_path)


@pytest.mark.parametrize("name", EXPORTED)
def test_there_and_back_again(name: str, tmp_path: Path) -> None:
    """SAELens saves what it loaded from us; without granary.json it is read by its SAELens architecture."""
    sae = make(name).eval()
    sae_core.save(sae, tmp_path / "ours")
    sae_lens.SAE.load_from_disk(tmp_path / "ours").save_model(tmp_path / "theirs")
    x = rows(seed=50)
    with torch.no_grad():
        assert difference(sae_core.load(tmp_path / "theirs")(x).x_hat, sae(x).x_hat) < TOLERANCE


# -- the same weights and the same batch ---------------------------------------------------------------------------


TANH = {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_bandwidth": 0.5}
SAME: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {  # a type of ours, its options; theirs
    "vanilla": ("vanilla", {"l1_coef": 0.7}, "standard", {}),
    "topk": ("topk", {}, "topk", {"rescale_acts_by_decoder_norm": False}),
    # Their default selects by p|W_dec| and decodes with W_dec/|W_dec|: the norms cancel in the reconstruction and in
    # its gradient, and at unit rows, where ours are kept, in the selection too.
    "topk, rescaled": ("topk", {}, "topk", {"rescale_acts_by_decoder_norm": True}),
    "abstopk": ("abstopk", {}, "abstopk", {"rescale_acts_by_decoder_norm": False}),
    "batchtopk": ("batchtopk", {}, "batchtopk", {"rescale_acts_by_decoder_norm": False}),  # k is per row in both
    "tanh, 0.1": ("jumprelu", {"recipe": "tanh", "threshold_init": 0.1, "bandwidth": 0.5}, "jumprelu", TANH),
    "tanh, 1.0": ("jumprelu", {"recipe": "tanh", "threshold_init": 1.0, "bandwidth": 0.5}, "jumprelu", TANH),
    "l0": ("jumprelu", {"recipe": "l0", "threshold_init": 0.3, "bandwidth": 0.2}, "jumprelu",
           {"jumprelu_sparsity_loss_mode": "step", "jumprelu_bandwidth": 0.2}),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_a_step_equals_theirs(case: str) -> None:
    name, options, kind, lens_options = SAME[case]
    x, sae = rows(seed=20), make(name, **options, **({"l0_coef": 0.7} if name == "jumprelu" else {}))
    out, losses, grads = step(sae, x)
    lens_out, lens_losses, lens_grads = lens_step(lens(kind, sae, **lens_options), x, l1=0.7, l0=0.7)
    assert bool((out.codes.values < 0).any()) == (name == "abstopk")
    assert difference(out.codes.dense(), lens_out.feature_acts) < TOLERANCE
    assert difference(out.x_hat, lens_out.sae_out) < TOLERANCE
    for term, value in losses.items():
        assert difference(value, lens_losses[f"{term}_loss"]) < TOLERANCE, term
    assert_equal_gradients(grads, lens_grads)


def test_vanilla_fvu_is_the_same_loss_divided_by_a_constant() -> None:
    """Our default divides the whole loss by V = E|x - mean|^2, so every gradient is theirs divided by V."""
    x, sae = rows(seed=20), make("vanilla", l1_coef=0.7, loss="fvu")
    _, losses, grads = step(sae, x)
    _, lens_losses, lens_grads = lens_step(lens("standard", sae), x, l1=0.7)
    V = (rows() - rows().mean(0)).square().sum(1).mean()
    assert difference(losses["fvu"] * V, lens_losses["mse_loss"]) < TOLERANCE
    assert difference(losses["l1"] * V, lens_losses["l1_loss"]) < TOLERANCE
    assert_equal_gradients({name: grad * V for name, grad in grads.items()}, lens_grads)


def test_matching_pursuit_equals_matching_pursuit() -> None:
    """Theirs also stops at a small residual or an unchanged support, both off here: ours always takes k steps."""
    x, sae = rows(seed=20), make("matching_pursuit")
    options = {"decoder_init_norm": 1.0, "max_iterations": K, "residual_threshold": 0.0}
    theirs = training_sae("MatchingPursuit", **options, stop_on_duplicate_support=False)
    theirs.W_dec.data.copy_(sae.W_dec.data)
    theirs.b_dec.data.copy_(sae.b_dec.data)
    out, losses, grads = step(sae, x)
    lens_out, lens_losses, lens_grads = lens_step(theirs, x)
    assert difference(out.x_hat, lens_out.sae_out) < TOLERANCE
    assert difference(losses["mse"], lens_losses["mse_loss"]) < TOLERANCE
    assert_equal_gradients(grads, lens_grads)


def test_batchtopk_thresholds_differ_while_training() -> None:
    """Both average the smallest kept activation. Theirs is an EMA of rate 0.01 that starts at 0 and is used as it is:
    after n steps it has reached 1 - 0.99^n of its goal. Ours has rate 0.001, is divided by its weight so far, and a
    calibration on training rows (mean L0 = k) replaces it at the end."""
    sae = make("batchtopk")
    fresh = sae_core.registry.get("batchtopk")(sae.config).train()
    fresh.load_state_dict({**sae.state_dict(), **{k: v for k, v in fresh.state_dict().items() if "threshold" in k}})
    theirs = lens("batchtopk", sae, rescale_acts_by_decoder_norm=False)
    smallest = []
    with torch.no_grad():
        for seed in range(20):
            out = fresh(rows(seed=seed))
            fresh.track(out)
            lens_out = theirs.training_forward_pass(TrainStepInput(rows(seed=seed), {}, None, 0, False))
            smallest.append(float(lens_out.feature_acts[lens_out.feature_acts > 0].min()))
    assert float(fresh.threshold.value) == pytest.approx(sum(smallest) / 20, rel=0.02)
    reached = sum(0.01 * 0.99 ** (19 - i) * s for i, s in enumerate(smallest))
    assert float(theirs.topk_threshold) == pytest.approx(reached, rel=1e-6)
    assert float(theirs.topk_threshold) < 0.2 * float(fresh.threshold.value)


def test_matryoshka_equals_matryoshka() -> None:
    """Both sum the losses of the nested prefixes; theirs logs the proper prefixes one by one, ours as one term."""
    x, sae = rows(seed=20), make("matryoshka")
    assert list(sae.config.prefixes) == TRAINERS["matryoshka"][1]["matryoshka_widths"]
    out, losses, grads = step(sae, x)
    lens_out, lens_losses, lens_grads = lens_step(lens("matryoshka", sae, rescale_acts_by_decoder_norm=False), x)
    assert difference(out.x_hat, lens_out.sae_out) < TOLERANCE
    assert difference(losses["mse"], lens_losses["mse_loss"]) < TOLERANCE
    inner = sum(value for name, value in lens_losses.items() if name.startswith("inner_mse_loss"))
    assert difference(losses["prefixes"], inner) < TOLERANCE
    assert_equal_gradients(grads, lens_grads)


def test_gated_equals_gated_at_unit_decoder_rows_but_for_the_frozen_copy() -> None:
    """SAELens lets the auxiliary reconstruction train W_dec and b_dec and weights the L1 by |W_dec|; the paper
    (arXiv 2404.16014, section 3.2) uses a frozen copy and unit rows, as ours does. Values are equal, so are the
    gradients of W_enc, b_gate, b_mag and r_mag; those of the decoder are not, and must not be."""
    x, sae = rows(seed=20), make("gated", l1_coef=0.7)
    out, losses, grads = step(sae, x)
    lens_out, lens_losses, lens_grads = lens_step(lens("gated", sae), x, l1=0.7)
    assert difference(out.x_hat, lens_out.sae_out) < TOLERANCE
    assert difference(losses["mse"], lens_losses["mse_loss"]) < TOLERANCE
    assert difference(losses["l1"], lens_losses["l1_loss"]) < TOLERANCE
    assert difference(losses["aux"], lens_losses["auxiliary_reconstruction_loss"]) < TOLERANCE
    for name in ("W_enc", "b_gate", "b_mag", "r_mag"):
        assert difference(grads[name], lens_grads[name]) < TOLERANCE, name
    for name in ("W_dec", "b_dec"):
        assert difference(grads[name], lens_grads[name]) > 0.01, name


def test_jumprelu_dead_penalty_equals_pre_act_loss() -> None:
    """Both look at dead latents only. Theirs reaches b_dec through the centring; ours is detached from it."""
    x = rows(seed=20)
    sae = make("jumprelu", recipe="tanh", l0_coef=0.7, bandwidth=0.5, dead_coef=0.2)
    dead = torch.arange(D_SAE) % 3 == 0
    sae.num_tokens_since_fired.fill_(0)
    sae.num_tokens_since_fired[dead] = sae.config.dead_after_tokens
    _, losses, grads = step(sae, x)
    theirs = lens(
        "jumprelu", sae, jumprelu_sparsity_loss_mode="tanh", jumprelu_bandwidth=0.5, pre_act_loss_coefficient=0.2
    )
    _, lens_losses, lens_grads = lens_step(theirs, x, dead, l0=0.7)
    assert difference(losses["dead"], lens_losses["pre_act_loss"]) < TOLERANCE
    for name in ("W_enc", "b_enc", "W_dec", "threshold"):
        assert difference(grads[name], lens_grads[name]) < TOLERANCE, name
    assert difference(grads["b_dec"], lens_grads["b_dec"]) > TOLERANCE


def test_jumprelu_anthropic_equals_tanh_with_ste_to_input() -> None:
    """Ours trains log theta; the pre-activation loss, which SAELens has for dead latents alone, is off."""
    x = rows(seed=20)
    sae = make("jumprelu", recipe="anthropic", l0_coef=0.7, threshold_init=0.3, bandwidth=0.5, dead_coef=0.0)
    _, losses, grads = step(sae, x)
    options = {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_bandwidth": 0.5, "jumprelu_ste_to_input": True}
    theirs = lens("jumprelu", **options)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(sae.theta if name == "threshold" else dict(sae.named_parameters())[name])
    _, lens_losses, lens_grads = lens_step(theirs, x, l0=0.7)
    assert difference(losses["l0"], lens_losses["l0_loss"]) < TOLERANCE
    grads["threshold"] = grads.pop("threshold.raw") / sae.theta.detach()
    assert_equal_gradients(grads, lens_grads)


def test_jumprelu_l0_target_differs_from_quadratic() -> None:
    """Ours is (mean L0 / target - 1)^2, of the batch's L0 as in the paper (arXiv 2407.14435, appendix). Theirs is
    2/target * mean over rows of (L0 - target)^2: it also punishes the spread of L0 over rows, and is larger by
    2 * target. On one row, where there is no spread, the two differ by that factor alone."""
    target = 5.0
    sae = make("jumprelu", recipe="l0_target", l0_coef=0.7, l0_target=target, threshold_init=0.3, bandwidth=0.2)
    mode = {"jumprelu_sparsity_loss_mode": "quadratic", "jumprelu_bandwidth": 0.2, "target_l0": target}
    one = rows(seed=20)[:1]
    _, losses, _ = step(sae, one)
    _, lens_losses, _ = lens_step(lens("jumprelu", sae, **mode), one, l0=0.7)
    assert difference(2 * target * losses["l0"], lens_losses["l0_loss"]) < TOLERANCE
    x = rows(seed=20)
    out, losses, _ = step(sae, x)
    _, lens_losses, _ = lens_step(lens("jumprelu", sae, **mode), x, l0=0.7)
    spread = (out.codes.dense().detach() != 0).sum(1).double().var(correction=0)
    expected = 2 * target * losses["l0"].double() + 0.7 * 2 / target * spread
    assert difference(expected, lens_losses["l0_loss"]) < TOLERANCE


def positive_dead(sae: SAE) -> Tensor:
    """Mark six latents as dead and make their pre-activations positive on all rows: no ReLU in AuxK matters."""
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[::16] = True
    with torch.no_grad():
        sae.b_enc[dead] += 20.0
        sae.W_enc[:, dead] *= 0.1
    sae.num_tokens_since_fired.zero_()
    sae.num_tokens_since_fired[dead] = sae.config.dead_after_tokens
    return dead


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka"])
def test_auxk_equals_theirs_up_to_its_unit(name: str) -> None:
    """Ours follows the paper's code: ReLU'd pre-activations, divided by the variance of the error it reconstructs,
    nothing to b_dec. Theirs has no ReLU (negative codes of dead latents count), is not divided (AuxK fades as the
    reconstruction improves), and trains b_dec through the pre-activations. With positive pre-activations the terms
    differ by the constant V / variance(error) alone, and so do the gradients of W_enc, b_enc and W_dec."""
    x, sae = rows(seed=20), make(name, auxk_coef=0.5)
    dead = positive_dead(sae)
    out, losses, grads = step(sae, x)
    theirs = lens(name, sae, rescale_acts_by_decoder_norm=False, aux_loss_coefficient=0.5)
    _, lens_losses, lens_grads = lens_step(theirs, x, dead)
    error = (x - out.x_hat).detach()
    unit = sae.loss_variance / (error - error.mean(0)).square().sum(1).mean()
    assert difference(losses["auxk"] / unit, lens_losses["auxiliary_reconstruction_loss"]) < TOLERANCE

    without_auxk = make(name, auxk_coef=0.0)
    without_auxk.load_state_dict(sae.state_dict())
    _, _, plain = step(without_auxk, x)
    _, _, lens_plain = lens_step(lens(name, sae, rescale_acts_by_decoder_norm=False), x)
    for parameter in ("W_enc", "b_enc", "W_dec"):
        ours_aux = (grads[parameter] - plain[parameter]) / unit
        assert difference(ours_aux, lens_grads[parameter] - lens_plain[parameter]) < 1e-4, parameter
    assert difference(grads["b_dec"], plain["b_dec"]) < TOLERANCE
    assert difference(lens_grads["b_dec"], lens_plain["b_dec"]) > TOLERANCE
