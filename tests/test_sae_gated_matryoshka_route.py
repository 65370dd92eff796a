"""Gated, matryoshka and route by hand-computed numbers, and the identities that tie them to simpler variants."""

import pytest
import torch
from sae_kit import new

from sae_granary.sae_core import SAE, Codes, Progress, registry
from sae_granary.sae_core.errors import OptionError

LAST = Progress(99, 100)


def build(name: str, **options: object) -> SAE:
    return new(name, **{"d_in": 8, "d_sae": 32, **options})


def rows(n: int = 128, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 8, generator=generator) * 2 + 1


def total(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(losses.values())).sum()


# -- gated -----------------------------------------------------------------------------------------------------


def gated_by_hand() -> SAE:
    cls = registry.get("gated")
    sae = cls(cls.Config(2, 2, normalize="none", loss="mse", l1_coef=2.0))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
        sae.b_gate.copy_(torch.tensor([-1.0, 0.5]))
        sae.b_mag.copy_(torch.tensor([0.25, -1.0]))
        sae.r_mag.copy_(torch.tensor([2.0, 1.0]).log())
    return sae.train()


def test_gated_by_hand() -> None:
    sae = gated_by_hand()
    x = torch.tensor([[3.0, 0.2], [0.5, 4.0]])
    out = sae(x)
    # gate: x + b_gate = [[2, 0.7], [-0.5, 4.5]]; magnitude: [2 x0 + 0.25, x1 - 1] = [[6.25, -0.8], [1.25, 3]]
    assert out.codes.dense().tolist() == [[6.25, 0.0], [0.0, 3.0]]
    losses = sae.losses(out, LAST)
    assert float(losses["mse"].detach()) == pytest.approx(((3 - 6.25) ** 2 + 0.2**2 + 0.5**2 + 1) / 2)
    assert float(losses["l1"].detach()) == pytest.approx(2.0 * (2 + 0.7 + 4.5) / 2)
    assert float(losses["aux"].detach()) == pytest.approx((1 + 0.5**2 + 0.5**2 + 0.5**2) / 2)


def test_the_auxiliary_loss_of_gated_does_not_move_the_decoder() -> None:
    sae = gated_by_hand()
    losses = sae.losses(sae(torch.tensor([[3.0, 0.2], [0.5, 4.0]])), LAST)
    losses["aux"].backward()
    assert sae.W_dec.grad is None
    assert sae.W_enc.grad.any()
    assert sae.b_gate.grad.any()
    assert sae.r_mag.grad is None or not sae.r_mag.grad.any()


def test_gated_is_a_jumprelu_with_the_documented_threshold() -> None:
    sae = build("gated", normalize="none")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (sae.b_gate, sae.b_mag, sae.r_mag):
            parameter.copy_(torch.randn(32, generator=generator))
    jumprelu = build("jumprelu", recipe="tanh", normalize="none").eval()
    with torch.no_grad():
        jumprelu.W_enc.copy_(sae.W_enc * sae.r_mag.exp())
        jumprelu.W_dec.copy_(sae.W_dec)
        jumprelu.b_dec.copy_(sae.b_dec)
        jumprelu.b_enc.copy_(sae.b_mag)
        jumprelu.threshold.copy_((sae.b_mag - sae.r_mag.exp() * sae.b_gate).clamp_min(0))
        x = rows(500)
        torch.testing.assert_close(sae.eval().encode(x).dense(), jumprelu.encode(x).dense(), rtol=1e-5, atol=1e-5)


# -- matryoshka ------------------------------------------------------------------------------------------------


def test_matryoshka_by_hand() -> None:
    cls = registry.get("matryoshka")
    sae = cls(cls.Config(3, 3, k=2, normalize="none", loss="mse", group_sizes=(1, 2)))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
        sae.W_dec.copy_(torch.eye(3))
        sae.b_dec.zero_()
    out = sae.train()(torch.tensor([[3.0, 1.0, 2.0], [5.0, 0.5, -1.0]]))
    assert out.codes.dense().tolist() == [[3.0, 1.0, 2.0], [5.0, 0.0, 0.0]]
    assert out.extras["prefix_errors"].tolist() == [5.0, 1.25]
    assert out.recon.tolist() == [[3.0, 1.0, 2.0], [5.0, 0.0, 0.0]]
    losses = sae.losses(out, LAST)
    assert float(losses["mse"].detach()) == pytest.approx((0.25 + 1) / 2)
    assert float(losses["prefixes"].detach()) == pytest.approx((1 + 4 + 0.25 + 1) / 2)


def test_matryoshka_with_one_prefix_is_batchtopk() -> None:
    runs = []
    for name, options in (("batchtopk", {}), ("matryoshka", {"fractions": (1.0,)})):
        sae = build(name, k=3, **options)
        sae.initialize(rows(), torch.Generator().manual_seed(1))
        out = sae.train()(rows(40, seed=1))
        losses = sae.losses(out, LAST)
        total(losses).backward()
        runs.append((out.codes.dense().detach(), {k: float(v.detach()) for k, v in losses.items()}, sae.W_dec.grad))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-6)
    torch.testing.assert_close(runs[0][2], runs[1][2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_sizes": (4, 4)}, r"group_sizes=\(4, 4\) sum to 8: expected d_sae=32"),
        ({"group_sizes": (-4, 36)}, "expected d_sae=32"),
        ({"fractions": (0.5,)}, "expected shares in .0, 1. that end with 1"),
        ({"fractions": (0.5, 0.25, 1.0)}, "the prefixes must grow"),
    ],
)
def test_groups_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        build("matryoshka", **options)


# -- route -----------------------------------------------------------------------------------------------------


def routed_layers(n: int = 64, seed: int = 0) -> dict[str, torch.Tensor]:
    return {f"layer_{i}": rows(n, seed=10 * seed + i) for i in range(3)}


@pytest.mark.parametrize("routing", ["hard", "soft"])
@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_routing_is_the_formula(routing: str, aggregate: str) -> None:
    sae = build("route", n_hooks=3, routing=routing, aggregate=aggregate)
    x = routed_layers()
    layers = torch.stack([(v - v.mean(1, keepdim=True)) / (v.std(1, keepdim=True) + 1e-5) for v in x.values()], 1)
    seen = layers.sum(1) if aggregate == "sum" else layers.mean(1)
    r = torch.softmax(seen @ sae.W_router, dim=1)
    naive = torch.stack(
        [r[i].max() * layers[i, r[i].argmax()] if routing == "hard" else r[i] @ layers[i] for i in range(64)]
    )
    source = sae.prepare(x)
    torch.testing.assert_close(source.input, naive)
    assert source.input.requires_grad
    assert not source.target.requires_grad


@pytest.mark.parametrize("base", ["topk", "batchtopk", "jumprelu", "vanilla", "gated", "matryoshka"])
def test_route_over_one_layer_is_its_base_with_unit_norm_and_nmse(base: str) -> None:
    x = rows(64, seed=5)
    route = build("route", base=base, n_hooks=1)
    route.initialize({"layer_0": rows()}, torch.Generator().manual_seed(2))
    plain = build(base, normalize="unit_norm", loss="nmse")
    plain.initialize(rows(), torch.Generator().manual_seed(2))
    plain.load_state_dict(route.base_sae.state_dict(), strict=False)
    routed, expected = route.train()({"layer_0": x}), plain.train()(x)
    assert torch.equal(routed.recon, expected.recon)
    ours, theirs = route.losses(routed, LAST), plain.losses(expected, LAST)
    assert {k: float(v.detach()) for k, v in ours.items()} == {k: float(v.detach()) for k, v in theirs.items()}
    total(ours).backward()
    total(theirs).backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(route.base_sae.get_parameter(name).grad, parameter.grad), name


@pytest.mark.parametrize("detach_target", [True, False])
def test_route_over_one_layer_takes_its_target_as_over_several(detach_target: bool) -> None:
    for n_hooks in (1, 2):
        sae = build("route", n_hooks=n_hooks, detach_target=detach_target)
        source = sae.prepare({f"layer_{i}": rows(8, seed=i).requires_grad_() for i in range(n_hooks)})
        assert source.input.requires_grad
        assert source.target.requires_grad is not detach_target
        assert not source.reference.requires_grad


def mean_p_max(detach_target: bool) -> float:
    """Train a route under the fvu loss on three layers that carry the same signal; return the final mean p_max."""
    generator = torch.Generator().manual_seed(0)
    sae = build("route", n_hooks=3, loss="fvu", detach_target=detach_target, base="topk", k=2, d_sae=16)
    sae.initialize(routed_layers(512), generator)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for step in range(150):
        losses = sae.losses(sae(routed_layers(128, seed=step)), Progress(step, 150))
        optimizer.zero_grad()
        total(losses).backward()
        optimizer.step()
        sae.after_step()
    return sae.monitor(sae(routed_layers(512, seed=999)))["p_max"]


def test_a_target_that_moves_with_the_router_is_shrunk_by_it_and_a_detached_one_is_not() -> None:
    detached, moving = mean_p_max(True), mean_p_max(False)
    assert detached > 0.5
    assert moving < 0.4  # 1/L = 0.33


def test_route_takes_the_middle_half_of_the_layers() -> None:
    names = [f"layer_{i}" for i in range(12)] + ["pooled"]
    route = registry.get("route")
    assert route.reads.default_hooks(names, 12) == ("layer_3", "layer_4", "layer_5", "layer_6", "layer_7", "layer_8")
    assert route.reads.default_hooks(names[2:5], 6) == ("layer_2", "layer_3", "layer_4")
    assert route.reads.default_hooks(["layer_0", "layer_5"], 6) == ("layer_0", "layer_5")  # too few are in the middle
    assert route.reads.default_hooks(["layer_0", "layer_1"], None) == ("layer_0", "layer_1")
    assert registry.get("crosscoder").reads.default_hooks(names, 12) == tuple(names)


def test_route_reports_where_rows_went() -> None:
    sae = build("route", n_hooks=3)
    metrics = sae.monitor(sae(routed_layers()))
    assert sum(metrics[f"route_{i}"] for i in range(3)) == pytest.approx(1.0)
    assert 0 <= metrics["route_entropy"] <= 1.0987
    assert 1 / 3 <= metrics["p_max"] <= 1.0


def test_route_refuses_what_does_not_fit() -> None:
    with pytest.raises(OptionError, match="base='route' reads several hook points"):
        build("route", base="route")
    with pytest.raises(OptionError, match="base_options holds 'normalize': set it on route itself"):
        build("route", base_options={"normalize": "mean"})
    with pytest.raises(OptionError, match="k: base 'vanilla' has no such option"):
        build("route", base="vanilla", k=4)
    with pytest.raises(OptionError, match="k=64: expected k <= d_sae=32"):
        build("route", base="topk", k=64)
    with pytest.raises(OptionError, match="reads 3 hook points, the batch holds 2: a, b"):
        build("route", n_hooks=3)({"a": rows(), "b": rows()})
    with pytest.raises(OptionError, match="reads one hook point, the batch holds 2: a, b"):
        build("topk")({"a": rows(), "b": rows()})


def test_codes_of_a_route_decode_in_the_space_of_the_routed_rows() -> None:
    sae = build("route", n_hooks=3).eval()
    out = sae(routed_layers())
    assert isinstance(out.codes, Codes)
    assert torch.equal(out.x, sae.prepare(routed_layers()).input)
