"""jumprelu's recipes: L0 follows its target or its coefficient, formulas, old recipes as they were, files."""

import json
from pathlib import Path

import jumprelu_curves
import pytest
import torch
from sae_kit import new

from sae_granary import sae_core
from sae_granary.sae_core import SAE, Progress, functional
from sae_granary.sae_core.errors import OptionError
from sae_granary.sae_core.variants.jumprelu_recipes import RECIPES, JumpReLUConfig
from sae_granary.train.config.merge import from_sections, make_config, to_sections
from sae_granary.train.loop import train_step
from sae_granary.train.optim.ema import Ema
from sae_granary.train.optim.resample import latent_axes, resample
from sae_granary.train.state.run_state import Run
from sae_granary.train.step_input import RowInput

D_IN, D_SAE = jumprelu_curves.D_IN, 64
OLD = [name for name, recipe in RECIPES.items() if not recipe.logarithm]
rows = jumprelu_curves.rows


def make(recipe: str = "constraint", **options: object) -> SAE:
    sae = new("jumprelu", {"l0_target": 4.0}, d_in=D_IN, d_sae=D_SAE, recipe=recipe, **options)
    sae.initialize(rows(512, 1000), torch.Generator().manual_seed(1))
    return sae.train()


def l0_of(sae: SAE, seeds: range) -> float:
    """Mean L0 of inference."""
    sae.eval()
    return sum(sae.encode(rows(seed=seed)).l0() for seed in seeds) / len(seeds)


def trained(recipe: str, n_steps: int = 60, **settings: object) -> Run:
    """A run behind its last step, before the calibration."""
    run = jumprelu_curves.make_run(recipe, steps=n_steps, **settings)
    for step in range(n_steps):
        train_step(run, RowInput({"x": rows(seed=step)}))
    return run


# -- L0 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [2.0, 16.0])
def test_l0_is_the_target(target: float) -> None:
    sae = trained("constraint", l0_target=target).sae
    assert l0_of(sae, range(100, 120)) == pytest.approx(target, rel=0.1)  # held by the training alone
    sae.calibrate(rows(seed=seed) for seed in range(60))
    assert l0_of(sae, range(60)) == pytest.approx(target, rel=0.005)
    assert sae.config.wanted_l0 == target


def test_a_target_above_the_positive_pre_activations_lets_all_of_them_through() -> None:
    run = trained("constraint", l0_target=60.0)
    assert l0_of(run.sae, range(100, 120)) < 50  # as many are positive
    for _ in range(600):  # steps of L0 alone: without a bound theta becomes 0, and the kernel divides by it
        run.sae.threshold.count(torch.zeros(D_SAE, dtype=torch.int64), torch.tensor(0), 1)
        run.sae.after_step()
    out = run.sae.train()(rows(seed=3))
    sum(run.sae.losses(out, Progress(0, 100)).values()).backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in run.sae.parameters())
    run.sae.calibrate([rows(seed=4)])
    assert 0 < float(run.sae.theta.detach().min()) < 1e-20


@pytest.mark.parametrize("target", [2.0, 16.0])
def test_the_first_threshold_gives_the_target(target: float) -> None:
    sae = make(l0_target=target)
    assert sae.encode(rows(512, 1000)).l0() == pytest.approx(target, rel=0.01)
    assert sae.theta.std() < 1e-6


@pytest.mark.parametrize("recipe", ["l0_penalty", "tanh_penalty"])
def test_a_larger_coefficient_gives_a_smaller_l0(recipe: str) -> None:
    coefs = (0.003, 0.1, 3.0)
    l0 = [l0_of(trained(recipe, 30, l0_coef=coef).sae, range(100, 105)) for coef in coefs]
    assert l0 == sorted(l0, reverse=True)
    assert l0[0] > 4 * l0[-1]


def test_thresholds_move_apart_where_that_pays() -> None:
    run = trained("constraint")
    assert float(run.sae.theta.detach().log().std()) > 0.05
    assert float(run.sae.threshold.price) > 0


# -- formulas ----------------------------------------------------------------------------------------------------


def by_hand(recipe: str, x: torch.Tensor, sae: SAE) -> dict[str, torch.Tensor]:
    """Gradients by log theta over the whole (N, F) matrix: of the reconstruction, and of the penalty."""
    beta, theta, n = sae.bandwidth, sae.theta.detach(), len(x)
    source = sae.normalizer(x).values
    p = ((source - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()
    z = (p * (p > theta)).requires_grad_()
    recon = z @ sae.W_dec.detach() + sae.b_dec.detach()
    fvu = (source - recon).square().sum(1).mean() / sae.loss_variance
    (grad_z,) = torch.autograd.grad(fvu, z)
    window = ((p / theta - 1).abs() < beta / 2).float()
    jump = torch.tanh(4.0 * theta) if recipe == "tanh_penalty" else 1.0
    penalty = -(jump * window / beta).sum(0) / n / sae.loss_variance * sae.l0_coef
    return {"fvu": (-theta * window / beta * grad_z).sum(0), "l0": penalty, "f": window.sum(0) / beta / n}


@pytest.mark.parametrize("recipe", ["constraint", "l0_penalty", "tanh_penalty"])
def test_gradients_by_the_logarithm_of_the_threshold(recipe: str) -> None:
    sae, x = make(recipe), rows(seed=3)
    expected, last = by_hand(recipe, x, sae), Progress(99, 100)
    losses = sae.losses(sae(x), last)
    for name, loss in losses.items():
        (grad,) = torch.autograd.grad(loss, sae.threshold.raw, retain_graph=True)
        torch.testing.assert_close(grad / sae.threshold.speed, expected[name], rtol=1e-4, atol=1e-7)
    assert set(losses) == ({"fvu"} if recipe == "constraint" else {"fvu", "l0"})


def test_what_is_left_of_the_gradient_does_not_change_l0() -> None:
    sae, x = make(), rows(seed=3)
    expected = by_hand("constraint", x, sae)
    out = sae(x)
    sum(sae.losses(out, Progress(0, 100)).values()).backward()
    sae.track(out)
    sae.project_gradients()
    g, f = expected["fvu"], expected["f"]
    assert float(sae.threshold.price) == pytest.approx(float(g @ f / (f @ f)), rel=1e-4)
    grad = sae.threshold.raw.grad / sae.threshold.speed
    torch.testing.assert_close(grad, g - g @ f / (f @ f) * f, rtol=1e-3, atol=1e-7)
    assert abs(float(grad @ f)) < 1e-5 * float(g.norm() * f.norm())


def test_a_common_shift_corrects_l0() -> None:
    sae, x = make(), rows(seed=3)
    before = sae.theta.detach().log()
    out = sae(x)
    sum(sae.losses(out, Progress(0, 100)).values()).backward()
    sae.track(out)
    sae.project_gradients()
    slope = float(by_hand("constraint", x, sae)["f"].sum())
    sae.config.__dict__["l0_target"] = 3.9
    sae.after_step()
    shift = 0.3 * (out.codes.l0() - 3.9) / slope
    torch.testing.assert_close(sae.theta.detach().log() - before, torch.full((D_SAE,), shift), rtol=1e-3, atol=1e-6)
    moved = sae.theta.detach().clone()
    sae.after_step()  # outside of a step nothing was counted
    assert torch.equal(sae.theta, moved)


def test_the_published_gradient_of_anthropic_reaches_the_pre_activations() -> None:
    """As SAELens' jumprelu_ste_to_input: the estimator by p is the negative of that by theta."""
    from sae_granary.sae_core.functional import jumprelu

    p = torch.tensor([[0.45], [0.55], [0.8]], requires_grad=True)
    theta = torch.tensor([0.5], requires_grad=True)
    jumprelu(p, theta, 0.2, to_input=True).sum().backward()
    assert p.grad.flatten().tolist() == pytest.approx([2.5, 3.5, 1.0])
    assert theta.grad.tolist() == pytest.approx([-5.0])


@pytest.mark.parametrize("most", [0.0, 1.0])  # share of stored entries up to which codes are sparse: never, always
@pytest.mark.parametrize("recipe", ["anthropic", "tanh"])
def test_the_dead_term_is_the_formula(recipe: str, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "MAX_SPARSE_DENSITY", most)
    sae = make(recipe, dead_coef=2.0, dead_after_tokens=1, threshold_init=0.8, normalize="none")
    sae.num_tokens_since_fired[::3] = 5
    x = rows(seed=3)
    out = sae(x)
    assert out.codes.pattern.is_full == (most == 0.0)
    term = sae.losses(out, Progress(99, 100))["dead"]
    parameters = dict(sae.named_parameters())
    names = ["W_enc", "b_enc", "W_dec", "threshold.raw" if recipe == "anthropic" else "threshold"]
    W_enc, b_enc, W_dec, raw = doubles = [parameters[name].detach().double().requires_grad_() for name in names]
    theta = raw.exp() if recipe == "anthropic" else raw
    p = (x.double() - sae.b_dec.detach().double()) @ W_enc + b_enc
    latents = slice(None) if recipe == "anthropic" else slice(None, None, 3)
    gaps = torch.relu(theta - p) * W_dec.norm(dim=1)
    expected = 2.0 * gaps[:, latents].sum() / len(x) / sae.loss_scale.unit
    assert float(term.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    found = torch.autograd.grad(term, [parameters[name] for name in names])
    for mine, theirs in zip(found, torch.autograd.grad(expected, doubles), strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_gemma_is_the_l0_recipe_by_the_logarithm_with_unit_rows() -> None:
    new, old = make("gemma", threshold_init=0.8, bandwidth=0.4), make("l0", threshold_init=0.8, bandwidth=0.4)
    x, last = rows(seed=3), Progress(99, 100)
    for sae in (new, old):
        sum(sae.losses(sae(x), last).values()).backward()
    torch.testing.assert_close(new.threshold.raw.grad, 0.8 * old.threshold.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(new.W_enc.grad, old.W_enc.grad)
    assert new.unit_decoder
    assert not old.unit_decoder


# -- steps -------------------------------------------------------------------------------------------------------


def test_thresholds_are_outside_of_the_global_clip() -> None:
    """The matrices move as if the thresholds' gradient were not there; by sgd, whose steps show the scale."""
    runs = [jumprelu_curves.make_run("l0_penalty", optimizer="sgd", lr=0.1, l0_coef=c, beta1=0.0) for c in (0.0, 1e4)]
    for run in runs:
        result = train_step(run, RowInput({"x": rows()}), measure=True)
        assert result.grad_norm * float(run.sae.loss_variance) > 1  # the clip acts
    assert torch.equal(runs[0].sae.W_dec, runs[1].sae.W_dec)
    assert not torch.equal(runs[0].sae.theta, runs[1].sae.theta)


def test_a_threshold_gradient_that_overflows_changes_nothing() -> None:
    run = jumprelu_curves.make_run("constraint")
    before = {name: tensor.clone() for name, tensor in run.sae.state_dict().items()}
    run.sae.threshold.raw.register_hook(lambda grad: grad * float("inf"))
    assert not train_step(run, RowInput({"x": rows()})).accepted
    assert all(torch.equal(before[name], tensor) for name, tensor in run.sae.state_dict().items())
    assert int(run.sae.threshold.n_rows) == 0


def test_resampled_latents_start_at_the_threshold_of_the_others() -> None:
    run = trained("constraint", 5)
    assert latent_axes(run.sae)["threshold.raw"] == 0
    typical = float(run.sae.theta.detach().log().mean().exp())
    resample(run.sae, torch.tensor([3, 7]), {"x": rows(2)})
    assert run.sae.theta[3].item() == pytest.approx(typical, rel=1e-5)


def test_a_step_in_double_precision_is_that_of_single() -> None:
    sae, x = make().double(), rows(seed=3).double()
    out = sae(x)
    sum(sae.losses(out, Progress(0, 100)).values()).backward()
    sae.track(out)
    sae.project_gradients()
    expected = by_hand("constraint", x, sae)
    price = float(expected["fvu"] @ expected["f"].double() / expected["f"].double().square().sum())
    assert float(sae.threshold.price) == pytest.approx(price, rel=1e-6)


def test_averaged_weights_do_not_shift_thresholds() -> None:
    run = trained("constraint", 5)
    ema = Ema(run.sae, 0.5)
    theta = run.sae.theta.detach().clone()
    ema.copy_to(run.sae)
    assert torch.equal(run.sae.theta, theta)


# -- what was before -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_follows_its_recorded_curve(recipe: str) -> None:
    recorded = json.loads(jumprelu_curves.CURVES.read_text(encoding="utf-8"))[recipe]
    measured = jumprelu_curves.curve(recipe)
    assert measured["loss"][:2] == pytest.approx(recorded["loss"][:2], rel=1e-5)
    for name, values in recorded.items():  # other processors round differently
        assert measured[name] == pytest.approx(values, rel=5e-3), name


@pytest.mark.parametrize("recipe", OLD)
def test_an_old_recipe_has_the_state_that_it_had(recipe: str) -> None:
    shared = {"loss_variance", "loss_mean_square", "num_tokens_since_fired", "W_enc", "W_dec", "b_dec", "b_enc"}
    names = {name for name in make(recipe).state_dict() if not name.startswith("normalizer")}
    assert names == shared | {"threshold"}


def test_a_saved_configuration_without_a_recipe_is_of_the_recipe_that_was_the_default(tmp_path: Path) -> None:
    sae = make("tanh", threshold_init=0.3)
    sae_core.save_native(sae, tmp_path / "native")
    sae_core.save(sae, tmp_path / "inference")
    for file in (tmp_path / "native" / "sae.json", tmp_path / "inference" / "granary.json"):
        record = json.loads(file.read_text())
        del record["config"]["recipe"], record["sha256"]
        file.write_text(json.dumps({**record, "format": 1}))
    assert sae_core.load_native(tmp_path / "native").config.recipe == "tanh"
    assert sae_core.load(tmp_path / "inference").config.recipe == "tanh"
    sections = to_sections(jumprelu_curves.make_run("tanh", cache="c", name="n", hook=("h",)).config)
    sections["run"] |= {"device": "cpu", "compute_dtype": "float32", "shuffle_seed": 0, "init_seed": 0}
    del sections["model"]["recipe"]
    assert from_sections(sections, "config.yaml").options["recipe"] == "tanh"
    assert make_config([{"type": "jumprelu"}]).options.get("recipe", JumpReLUConfig.recipe) == "constraint"


# -- options and files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l0_coef": 3.0}, r"l0_coef=3.0 has no effect with recipe='constraint'.* set l0_target, or choose a recipe"),
        ({"l0_warmup": 0.5}, "l0_warmup=0.5 has no effect"),
        ({"l0_target": 65.0}, "l0_target=65: expected l0_target <= d_sae=64; lower it or raise d_sae"),
        ({"bandwidth": 2.0}, "bandwidth=2.0: expected a value < 2, it is in units of the threshold"),
    ],
)
def test_options_without_an_effect_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make(**options)


@pytest.mark.parametrize("normalize", ["mean+dataset", "unit_norm"])
@pytest.mark.parametrize("saelens", [False, True])
def test_files_give_equal_codes(normalize: str, saelens: bool, tmp_path: Path) -> None:
    run = trained("constraint", 20, normalize=normalize)
    sae = run.sae.eval()
    sae.calibrate([rows()])
    sae_core.save(sae, tmp_path)
    if saelens:
        (tmp_path / "granary.json").unlink()
    loaded, x = sae_core.load(tmp_path), rows(seed=500)
    with torch.no_grad():
        codes, again = sae.encode(x).dense(), loaded.encode(x).dense()
        scale = again.max() / codes.max()
        torch.testing.assert_close(loaded(x).x_hat, sae(x).x_hat, rtol=1e-4, atol=1e-4)
    assert torch.equal(codes > 0, again > 0)
    torch.testing.assert_close(again, codes * scale, rtol=1e-4, atol=1e-5)
    assert float(loaded.W_dec.detach().norm(dim=1).mean()) == pytest.approx(1.0, abs=1e-5)


def test_a_negative_threshold_of_a_file_never_gives_negative_codes(tmp_path: Path) -> None:
    sae = make()
    sae.latents["threshold"].write(sae.threshold, torch.linspace(-1, 1, D_SAE))
    assert float(sae.eval().encode(rows()).values.detach().min()) >= 0
    assert float(sae.theta.detach().min()) == 0.0
