"""Contract of every registered variant, and each variant's terms by hand-computed numbers."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sae_kit import new

from sae_granary import sae_core
from sae_granary.sae_core import SAE, Progress, registry
from sae_granary.sae_core.data import Rows
from sae_granary.sae_core.errors import NonFiniteError, NotAnSAEError, OptionError

D_IN, D_SAE = 16, 64
LAST = Progress(99, 100)


def rows(n: int = 256, seed: int = 0, d_in: int = D_IN) -> torch.Tensor:
    """Sparse mixtures of 32 directions with a little noise, around a mean far from zero."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(32, d_in, generator=torch.Generator().manual_seed(99))
    weights = torch.rand(n, 32, generator=generator) * (torch.rand(n, 32, generator=generator) < 0.1)
    return 3 * weights @ directions + 0.1 * torch.randn(n, d_in, generator=generator) + 2.0


def inputs(name: str, n: int = 256, seed: int = 0) -> Rows:
    """Rows of one hook point, or of two for a variant that reads more than one row."""
    x = rows(n, seed)
    two = {"layer_1": x, "layer_2": x.flip(1) + x.roll(1, dims=1)}
    return {"layer_1": x} if registry.get(name).reads.one_row else two


def cut(x: Rows, size: int) -> list[Rows]:
    """Split a batch into micro-batches."""
    return [dict(zip(x, parts, strict=True)) for parts in zip(*(hook.split(size) for hook in x.values()), strict=True)]


def make(name: str, **options: object) -> SAE:
    sae = new(name, {"k": 4, "l0_target": 4.0, "n_hooks": 2}, d_in=D_IN, d_sae=D_SAE, **options)
    sae.initialize(inputs(name), torch.Generator().manual_seed(1))
    return sae.train()


def train(sae: SAE, n_steps: int = 30, lr: float = 1e-2) -> list[float]:
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    totals = []
    for step in range(n_steps):
        out = sae(inputs(sae.type_name, seed=step))
        losses = sae.losses(out, Progress(step, n_steps))
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        sae.track(out)
        sae.project_gradients()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        sae.after_step()
        totals.append(float(losses[sae.config.loss].detach()))
    sae.calibrate(inputs(sae.type_name, seed=step) for step in range(4))
    return totals


every_variant = pytest.mark.parametrize("name", registry.names())


def normalizations(name: str) -> tuple[str, ...]:
    fields = {spec.name: spec for spec in dataclasses.fields(registry.get(name).Config)}
    return fields["normalize"].metadata["choices"]


# -- contract --------------------------------------------------------------------------------------------------


@every_variant
def test_shapes_and_finite_gradients_in_every_parameter(name: str) -> None:
    sae = make(name)
    out = sae(inputs(name, 50))
    assert out.x_hat.shape == out.x.shape == (50, sae.d_out)
    assert out.codes.shape == (50, D_SAE)
    torch.stack(list(sae.losses(out, LAST).values())).sum().backward()
    for parameter_name, parameter in sae.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.any(), parameter_name


@every_variant
def test_training_lowers_the_loss_and_is_deterministic(name: str) -> None:
    first, second = make(name), make(name)
    losses = train(first)
    assert losses[-1] < 0.7 * losses[0]
    assert train(second) == losses
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@every_variant
def test_calibration_is_the_same_on_batches_that_can_be_read_twice(name: str) -> None:
    sae = make(name)
    train(sae)
    batches, other = [inputs(name, seed=step) for step in range(4, 8)], copy.deepcopy(sae)
    sae.calibrate(batches)
    other.calibrate(iter(batches))
    for key, value in sae.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[key], rtol=3e-4, atol=0.0, equal_nan=True)  # two bins


@every_variant
def test_native_files_give_back_the_same_bits(name: str, tmp_path: Path) -> None:
    sae = make(name)
    train(sae, 5)
    sae_core.save_native(sae, tmp_path)
    loaded = sae_core.load_native(tmp_path)
    assert loaded.config == sae.config
    assert loaded.state_dict().keys() == sae.state_dict().keys()
    for key, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
        assert loaded.state_dict()[key].dtype == tensor.dtype, key
    x = inputs(name, 20, seed=5)
    for trained, read in ((sae.train(), loaded.train()), (sae.eval(), loaded.eval())):
        assert torch.equal(trained(x).x_hat, read(x).x_hat)


NORMALIZED = [(name, mode) for name in registry.names() for mode in normalizations(name)]


@pytest.mark.parametrize(("name", "normalize"), NORMALIZED)
def test_folding_the_normalization_leaves_the_reconstruction_unchanged(
    name: str, normalize: str, tmp_path: Path
) -> None:
    sae = make(name, normalize=normalize)
    train(sae, 5)
    sae.double().eval()  # in double precision no near-tie of a selection flips
    sae_core.save(sae, tmp_path, {"model_name": "toy"})
    loaded = sae_core.load(tmp_path)
    x = inputs(name, 40, seed=7)
    double = {hook: part.double() for hook, part in x.items()}
    with torch.no_grad():
        expected, got = sae(double), loaded(x)
    torch.testing.assert_close(got.x_hat.double(), expected.x_hat, rtol=1e-4, atol=1e-4)
    assert got.codes.l0() == pytest.approx(expected.codes.l0(), abs=0.2)
    assert float(loaded.core.W_dec.detach().norm(dim=1).mean()) == pytest.approx(1.0, abs=1e-5)


@every_variant
def test_encode_then_decode_is_forward(name: str) -> None:
    sae = make(name).eval()
    x = inputs(name, 30)
    with torch.no_grad():
        like = x if name in ("route", "route_matryoshka", "skip_transcoder") else None
        torch.testing.assert_close(sae.decode(sae.encode(x), like=like), sae(x).x_hat)


@every_variant
def test_accumulated_micro_batches_give_the_gradient_of_one_batch(name: str) -> None:
    whole, parts = make(name), make(name)
    if "threshold.ema" in whole.core.state_dict():
        pytest.skip("selects over the micro-batch by definition")
    parts.load_state_dict(whole.state_dict())
    x = inputs(name, 64)
    for sae, batches in ((whole, [x]), (parts, cut(x, 16))):
        for batch in batches:
            terms = sae.losses(sae(batch), LAST)
            (torch.stack(list(terms.values())).sum() / len(batches)).backward()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@every_variant
def test_the_loss_does_not_depend_on_the_scale_of_the_activations(name: str) -> None:
    def scaled(x: Rows, scale: float) -> Rows:
        return {hook: part * scale for hook, part in x.items()}

    losses = []
    for scale in (0.1, 1.0, 10.0):
        sae = make(name)
        sae.initialize(scaled(inputs(name), scale), torch.Generator().manual_seed(1))
        terms = sae.losses(sae(scaled(inputs(name, seed=3), scale)), LAST)
        losses.append([float(term.detach()) for term in terms.values()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[2] == pytest.approx(losses[1], rel=1e-3)


@every_variant
def test_dead_latents_are_counted_in_rows(name: str) -> None:
    sae = make(name, dead_after_tokens=100)
    with torch.no_grad():
        sae.core.W_dec[7] = 0.0  # pre-activation 0 forever
        if sae.core.has_encoder:
            sae.core.W_enc[:, 7] = 0.0
    for _ in range(3):
        assert not sae.dead_mask[7]
        sae.track(sae(inputs(name, 40)))
    assert sae.core.num_tokens_since_fired[7] == 120
    assert sae.dead_mask[7]
    assert not sae.dead_mask.all()


@every_variant
def test_options_are_checked_and_named(name: str) -> None:
    cls = registry.get(name)
    with pytest.raises(OptionError, match=r"d_sae=0: expected a value > 0"):
        sae_core.make_config(cls, {"d_in": 4, "d_sae": 0})
    with pytest.raises(OptionError, match=r"no option 'normalise' .*, did you mean 'normalize'\?"):
        sae_core.make_config(cls, {"d_in": 4, "d_sae": 8, "normalise": "none"})
    with pytest.raises(OptionError, match="normalize='half': expected one of "):
        sae_core.make_config(cls, {"d_in": 4, "d_sae": 8, "normalize": "half"})
    with pytest.raises(OptionError, match="needs option 'd_in'"):
        sae_core.make_config(cls, {"d_sae": 8})


@every_variant
def test_a_sample_with_nan_is_refused(name: str) -> None:
    sample = inputs(name)
    for rows_of_hook in sample.values():
        rows_of_hook[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        make(name).initialize(sample, torch.Generator())


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    sae_core.save(make("topk"), tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:100])
    with pytest.raises(NotAnSAEError, match="not a readable safetensors file"):
        sae_core.load(tmp_path)
    weights.write_bytes(content)
    (tmp_path / "granary.json").write_text('{"format": 7}')
    with pytest.raises(NotAnSAEError, match="format 7, this version reads format 1"):
        sae_core.load(tmp_path)
    with pytest.raises(NotAnSAEError, match="holds no SAE"):
        sae_core.load(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["vanilla", "topk", "jumprelu", "gated"])
def test_a_saelens_folder_without_b_dec_at_the_input_is_read(name: str, tmp_path: Path) -> None:
    """Their p = W x + b is our p = W (x - b_dec) + b + W b_dec; a gated magnitude has exp(r_mag) in front of W."""
    sae, x = make(name, normalize="none").eval(), rows(20)
    if name == "gated":
        sae.r_mag.data.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(0))
    sae_core.save(sae, tmp_path)
    (tmp_path / "granary.json").unlink()
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "apply_b_dec_to_input": False}))
    loaded = sae_core.load(tmp_path)
    with torch.no_grad():  # what SAELens computes: our formulas on rows that were moved by b_dec
        expected = sae.encode(x + sae.b_dec).dense()
    torch.testing.assert_close(loaded.encode(x).dense(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, "activation_fn='tanh-relu' of cfg.json cannot be read; known: relu, topk"),
        ({"activation_fn": "topk"}, "do not describe an SAE"),
        ({"finetuning_scaling_factor": True}, "fold it in with SAELens"),
        ({"architecture": "temporal"}, "architecture 'temporal' of cfg.json cannot be read; known: .*topk"),
        (
            {"normalize_activations": True},
            "normalize_activations=True cannot be read; expected one of none, layer_norm",
        ),
    ],
)
def test_a_saelens_folder_without_a_counterpart_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    sae_core.save(make("vanilla", normalize="none"), tmp_path)
    (tmp_path / "granary.json").unlink()
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, **change}))
    with pytest.raises(NotAnSAEError, match=message):
        sae_core.load(tmp_path)


# -- formulas --------------------------------------------------------------------------------------------------


def identity(name: str, **options: object) -> SAE:
    """d_in = d_sae = 3, encoder and decoder the identity, b_enc = b_dec = 0, no normalization."""
    sae = new(name, d_in=3, d_sae=3, normalize="none", loss="mse", **options)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
        sae.W_dec.copy_(torch.eye(3))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae.train()


X = torch.tensor([[3.0, 1.0, -2.0], [0.5, 2.0, 1.0]])


def test_vanilla_by_hand() -> None:
    sae = identity("vanilla", l1_coef=2.0)
    with torch.no_grad():
        sae.W_dec[1] *= 3  # |W_dec,1| = 3
    out = sae(X)
    assert out.codes.dense().tolist() == [[3.0, 1.0, 0.0], [0.5, 2.0, 1.0]]
    assert out.x_hat.tolist() == [[3.0, 3.0, 0.0], [0.5, 6.0, 1.0]]
    losses = sae.losses(out, LAST)
    assert float(losses["mse"].detach()) == pytest.approx((2**2 + 2**2 + 4**2) / 2)
    assert float(losses["l1"].detach()) == pytest.approx(2.0 * ((3 + 3 * 1) + (0.5 + 3 * 2 + 1)) / 2)
    assert float(sae.losses(out, Progress(0, 100))["l1"].detach()) == pytest.approx(0.2 * 13.5)  # ramp over 5 steps


def test_vanilla_is_invariant_to_moving_scale_between_encoder_and_decoder() -> None:
    sae = make("vanilla")
    scaled = copy.deepcopy(sae)
    factor = torch.linspace(0.5, 2.0, D_SAE)
    with torch.no_grad():
        scaled.W_enc.mul_(factor)
        scaled.b_enc.mul_(factor)
        scaled.W_dec.div_(factor[:, None])
    x = rows(40)
    for name, term in sae.losses(sae(x), LAST).items():
        torch.testing.assert_close(scaled.losses(scaled(x), LAST)[name], term)


def test_topk_by_hand() -> None:
    sae = identity("topk", k=2)
    out = sae(X)
    assert out.codes.dense().tolist() == [[3.0, 1.0, 0.0], [0.0, 2.0, 1.0]]
    assert out.codes.l0() == 2.0
    assert sae(-X.abs()).codes.l0() == 0.0  # ReLU after the selection


def test_batchtopk_by_hand() -> None:
    sae = identity("batchtopk", k=1)
    out = sae(X)
    assert out.codes.dense().tolist() == [[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]]
    sae.track(out)
    sae.eval()  # threshold 2: only what exceeds it
    assert sae(X).codes.dense().tolist() == [[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_batchtopk_inference_l0_is_k_after_calibration() -> None:
    sae = make("batchtopk", k=5)
    train(sae, 20)
    sae.eval()
    l0 = sum(sae.encode(rows(seed=step)).l0() for step in range(4)) / 4
    assert l0 == pytest.approx(5, rel=0.01)


def test_jumprelu_tanh_by_hand() -> None:
    sae = identity(
        "jumprelu", recipe="tanh", threshold_init=0.75, l0_coef=2.0, tanh_scale=0.5, dead_coef=0.1, dead_after_tokens=5
    )
    with torch.no_grad():
        sae.W_dec[1] *= 3
        sae.num_tokens_since_fired[2] = 5  # latent 2 counts as dead
    out = sae(X)
    assert out.codes.dense().tolist() == [[3.0, 1.0, 0.0], [0.0, 2.0, 1.0]]
    losses = sae.losses(out, LAST)
    activity = torch.tensor([3.0, 1.0 * 3, 2.0 * 3, 1.0])
    assert float(losses["l0"].detach()) == pytest.approx(2.0 * float(torch.tanh(0.5 * activity).sum()) / 2)
    # ReLU(theta - p) of latent 2: 0.75 + 2 = 2.75 and 0
    assert float(losses["dead"].detach()) == pytest.approx(0.1 * 2.75 / 2)


@pytest.mark.parametrize(("recipe", "expected"), [("l0", 3 * 2.5), ("l0_target", 3 * (2.5 / 2 - 1) ** 2)])
def test_jumprelu_l0_by_hand(recipe: str, expected: float) -> None:
    sae = identity("jumprelu", recipe=recipe, l0_coef=3.0, l0_target=2.0, threshold_init=0.2, bandwidth=0.7)
    out = sae(X)  # active: 3, 1 | 0.5, 2, 1 -> L0 = 2.5
    loss = sae.losses(out, LAST)["l0"]
    assert float(loss.detach()) == pytest.approx(expected)
    loss.backward()
    # Only p = 0.5 of latent 0 lies within 0.35 of its threshold: dL0/dtheta = -1/0.7, over two rows.
    slope = 3.0 if recipe == "l0" else 3.0 * 2 * (2.5 / 2 - 1) / 2
    assert sae.threshold.grad.tolist() == pytest.approx([-slope / 0.7 / 2, 0.0, 0.0])


def test_jumprelu_takes_gradients_from_entries_just_under_the_threshold() -> None:
    """The sparse path must agree with plain autograd over the whole (N, F) matrix."""
    sae = make("jumprelu", recipe="tanh", threshold_init=1.5, bandwidth=0.5)
    x = rows(32)
    out = sae(x)
    assert not out.codes.pattern.is_full or out.codes.l0() > 0
    torch.stack(list(sae.losses(out, LAST).values())).sum().backward()
    h = (sae.normalizer(x).values - sae.b_dec).detach()
    p = (h @ sae.W_enc + sae.b_enc).detach()
    theta, bandwidth = sae.threshold.detach(), sae.bandwidth
    z = (p * (p > theta)).requires_grad_()
    recon = z @ sae.W_dec.detach() + sae.b_dec.detach()
    fvu = (sae.normalizer(x).values - recon).square().sum(1).mean() / sae.loss_variance
    norms = sae.W_dec.detach().norm(dim=1)
    l0 = 10.0 * torch.tanh(4.0 * z * norms).sum() / 32 / sae.loss_variance
    (grad_z,) = torch.autograd.grad(fvu + l0, z)
    kernel = ((p - theta).abs() < bandwidth / 2).float()
    expected = (-(theta / bandwidth) * kernel * grad_z).sum(0)
    assert (kernel * (p < theta)).any()
    torch.testing.assert_close(sae.threshold.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["fvu", "mse", "nmse"])
def test_reconstruction_losses_by_formula(loss: str) -> None:
    sae = make("topk", loss=loss)
    x = rows(64, seed=2)
    out = sae(x)
    target, recon = out.source.target, out.recon
    squared = (target - recon).square().sum(1)
    sample = sae.normalizer(rows()).values
    expected = {
        "mse": squared.mean(),
        "fvu": squared.mean() / (sample - sample.mean(0)).square().sum(1).mean(),
        "nmse": (squared / target.square().sum(1)).mean(),
    }[loss]
    torch.testing.assert_close(sae.losses(out, LAST)[loss], expected)


def test_auxk_by_hand_and_its_gradient_paths() -> None:
    sae = identity("topk", k=1, auxk_coef=0.5, k_aux=2, dead_after_tokens=10)
    with torch.no_grad():
        sae.num_tokens_since_fired[2] = 10  # one dead latent of k_aux = 2: factor 1/2
        sae.b_dec[0] = 0.25
        sae.W_enc[2, 2] = 0.5
    x = torch.tensor([[3.0, 0.0, 1.0], [2.0, 0.0, -1.0]])
    out = sae(x)
    loss = sae.losses(out, LAST)["auxk"]
    # k = 1 keeps 3 - 0.25 and 2 - 0.25; the error is (0, 0, 1) and (0, 0, -1); the dead latent gives 0.5 and 0.
    squared, variance = (0.25 + 1) / 2, 1.0
    assert float(loss.detach()) == pytest.approx(0.5 * squared / variance * 0.5)
    loss.backward()
    assert sae.W_enc.grad[:, 2].any()
    assert not sae.W_enc.grad[:, :2].any()
    assert not sae.W_dec.grad[:2].any()
    assert sae.W_dec.grad[2].any()
    assert sae.b_dec.grad is None or not sae.b_dec.grad.any()


def test_auxk_of_signed_codes_ranks_by_magnitude() -> None:
    sae = identity("abstopk", k=1, auxk_coef=1.0, k_aux=1, dead_after_tokens=10)
    with torch.no_grad():
        sae.num_tokens_since_fired[1:] = 10  # two dead latents of which one reconstructs
    x = torch.tensor([[3.0, 0.5, -1.0], [3.0, 0.5, 1.5]])
    loss = sae.losses(sae(x), LAST)["auxk"]
    # The error is (0, 0.5, -1) and (0, 0.5, 1.5); latent 2 gives -1 and 1.5 of it, its variance is 1.25^2.
    assert float(loss.detach()) == pytest.approx(0.25 / 1.25**2)
    loss.backward()
    assert sae.W_dec.grad[2].any()
    assert not sae.W_dec.grad[:2].any()


def test_matching_pursuit_counts_a_latent_that_is_chosen_twice_once() -> None:
    sae = new("matching_pursuit", d_in=2, d_sae=2, k=2, normalize="none")
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    # (1, 2): 2.2 of latent 1 leaves (-0.32, 0.24), of which no latent takes any: its score with both is negative or 0.
    # (3, 1): 3 of latent 0 leaves (0, 1), 0.8 of latent 1.
    codes = sae.encode(torch.tensor([[1.0, 2.0], [3.0, 1.0]]))
    torch.testing.assert_close(codes.dense(), torch.tensor([[0.0, 2.2], [3.0, 0.8]]))
    assert codes.l0() == 1.5
    with torch.no_grad():
        sae.W_dec.mul_(0.5)  # rows that are too short: half of a quarter is taken, and the rest is wanted again
    out = sae(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(out.codes.dense(), torch.tensor([[3.5, 0.0], [0.0, 0.0]]))
    assert out.codes.l0() == 0.5
    assert out.codes.fired().tolist() == [1, 0]
    out.x_hat.sum().backward()
    assert sae.W_dec.grad[0].any()


def test_auxk_of_a_perfect_reconstruction_is_zero_and_finite() -> None:
    sae = identity("topk", k=3, dead_after_tokens=1)
    with torch.no_grad():
        sae.num_tokens_since_fired += 1
    out = sae(X.abs())
    assert float(out.source.target.sub(out.recon).abs().max().detach()) == 0.0
    assert float(sae.losses(out, LAST)["auxk"].detach()) == 0.0


def test_unit_decoders_stay_on_the_sphere_and_lose_their_radial_gradient() -> None:
    sae = make("topk")
    torch.stack(list(sae.losses(sae(rows()), LAST).values())).sum().backward()
    sae.project_gradients()
    assert float((sae.W_dec.grad * sae.W_dec).sum(1).abs().max().detach()) < 1e-6
    with torch.no_grad():
        sae.W_dec.mul_(1.7)
    sae.after_step()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_initialization_is_the_documented_one() -> None:
    sae = make("topk")
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert torch.equal(sae.W_enc.detach(), sae.W_dec.detach().t())
    assert not sae.b_enc.any()
    normalized = sae.normalizer(rows()).values
    assert float(normalized.square().sum(1).mean()) == pytest.approx(D_IN, rel=1e-4)
    centre = sae_core.functional.geometric_median(normalized)
    torch.testing.assert_close(sae.b_dec.detach().double(), centre, rtol=1e-4, atol=1e-4)


def test_unit_norm_rows_have_mean_zero_and_unbiased_variance_one() -> None:
    sae = make("topk", normalize="unit_norm")
    values = sae.normalizer(rows(10)).values
    torch.testing.assert_close(values.mean(1), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.var(1), torch.ones(10), atol=1e-3, rtol=0)
    with pytest.raises(OptionError, match="decode\\(codes, like=x\\)"):
        sae.decode(sae.encode(rows(10)))
    torch.testing.assert_close(sae.decode(sae.encode(rows(10)), like=rows(10)), sae(rows(10)).x_hat)


def test_unit_norm_is_undone_with_the_standard_deviation_alone() -> None:
    """As SAELens' layer_norm: for rows of a small scale the 1e-5 under the division shows in the reconstruction."""
    sae = make("topk", normalize="unit_norm")
    x = 1e-4 * rows(10)
    out = sae(x)
    expected = out.recon * x.std(1, keepdim=True) + x.mean(1, keepdim=True)
    torch.testing.assert_close(out.x_hat, expected, rtol=1e-5, atol=0)


def test_k_falls_from_k_start_and_inference_uses_k() -> None:
    sae = make("topk", k=4, k_start=16, k_anneal=0.5)
    l0 = []
    for step in (0, 4, 9, 19):
        sae.begin_step(Progress(step, 20))
        l0.append(sae(rows()).codes.pattern.entries[0].numel() / 256)
    assert l0 == [15, 10, 4, 4]  # 16 - 12 * (step + 1) / 10
    sae.begin_step(Progress(0, 20))
    assert sae.eval().encode(rows()).pattern.entries[0].numel() == 256 * 4


@pytest.mark.parametrize("name", ["topk", "batchtopk", "abstopk"])
def test_multi_topk_adds_an_eighth_of_the_loss_at_4k(name: str) -> None:
    plain, multi = make(name, k=4), make(name, k=4, multi_topk=True)
    wide = make(name, k=16)
    for sae in (multi, wide):
        sae.load_state_dict(plain.state_dict())
    x = rows(64)
    expected = wide.losses(wide(x), LAST)["fvu"] / 8
    torch.testing.assert_close(multi.losses(multi(x), LAST)["multi_topk"], expected)


@pytest.mark.parametrize("name", ["vanilla", "gated"])
def test_p_annealing_keeps_the_penalty_and_changes_its_gradient(name: str) -> None:
    plain, annealed = make(name), make(name, p_end=0.3)
    annealed.load_state_dict(plain.state_dict())
    x, last = rows(64), Progress(99, 100)
    terms = [sae.losses(sae(x), last)["l1"] for sae in (plain, annealed)]
    torch.testing.assert_close(terms[0], terms[1])
    for term in terms:
        term.backward()
    assert not torch.allclose(plain.W_enc.grad, annealed.W_enc.grad, rtol=0.01)


def test_thresholds_of_dead_latents_stop_at_zero() -> None:
    sae = make("jumprelu", recipe="tanh", dead_after_tokens=1, dead_coef=1.0)
    with torch.no_grad():
        sae.b_enc[:8] = -30.0  # these latents never fire, and the dead term pulls their thresholds down
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.05)
    for step in range(12):
        out = sae(rows(seed=step))
        optimizer.zero_grad()
        torch.stack(list(sae.losses(out, LAST).values())).sum().backward()
        sae.track(out)
        optimizer.step()
        sae.after_step()
    assert float(sae.threshold.detach().min()) == 0.0
    assert float(sae(rows()).codes.values.detach().min()) >= 0.0


def test_the_dead_term_of_jumprelu_leaves_the_decoder_bias_alone() -> None:
    sae = make("jumprelu", recipe="tanh", dead_after_tokens=1, dead_coef=1.0)
    sae.num_tokens_since_fired += 1
    sae.losses(sae(rows()), LAST)["dead"].backward()
    assert sae.b_dec.grad is None
    assert sae.W_enc.grad.any()


def test_multi_topk_of_a_skip_transcoder_sees_the_skip_path() -> None:
    sae = make("skip_transcoder", multi_topk=True)
    x = inputs("skip_transcoder", 32)
    before = float(sae.losses(sae(x), LAST)["multi_topk"].detach())
    with torch.no_grad():
        sae.W_skip.normal_(generator=torch.Generator().manual_seed(0))
    assert float(sae.losses(sae(x), LAST)["multi_topk"].detach()) != before


def test_a_subclass_is_not_taken_for_its_parent_in_other_tools_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.discover()
    monkeypatch.setattr(registry, "_VARIANTS", dict(registry._VARIANTS))

    @registry.register("zz_toy")
    class ToySAE(registry.get("topk")):  # type: ignore[misc]
        """A topk that computes something else."""

    sae_core.save(make("topk"), tmp_path / "topk")
    (tmp_path / "topk" / "granary.json").unlink()
    assert sae_core.load(tmp_path / "topk").type_name == "topk"
    sae_core.save(make("zz_toy"), tmp_path / "toy")
    assert not (tmp_path / "toy" / "cfg.json").exists()
    assert sae_core.load(tmp_path / "toy").type_name == "zz_toy"


def test_temporal_by_formula() -> None:
    sae = make("temporal", temporal_coef=0.5, temperature=0.2)
    x = inputs("temporal", 32)
    x["layer_2"][3] = sae.scalings()[1].undo(sae.b_dec).detach()  # a row that no latent is active for
    out = sae(x)
    now, before = out.codes.dense(), sae(x["layer_2"]).codes.dense()
    n_high = sae.config.prefixes[0]
    assert n_high == round(0.2 * D_SAE)
    a, b = F.normalize(now[:, :n_high], dim=1), F.normalize(before[:, :n_high], dim=1)
    log_p = torch.log_softmax(a @ b.t() / 0.2, dim=1)
    log_q = torch.log_softmax(b @ a.t() / 0.2, dim=1)
    expected = -0.5 * (log_p.diagonal().mean() + log_q.diagonal().mean()) / 2
    loss = sae.losses(out, LAST)["temporal"]
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(term, [sae.W_enc, sae.b_enc], retain_graph=True) for term in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)
    assert not before[3].any()
    sae.eval()
    torch.testing.assert_close(sae(x).x_hat, sae(x["layer_1"]).x_hat)  # inference reads one row
