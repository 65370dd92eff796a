"""Folders of other tools, damaged folders and altered ones: read as that tool reads them, or refused in one line."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mutations import mutate_bytes
from sae_kit import new
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_granary import sae_core
from sae_granary.sae_core import SAE
from sae_granary.sae_core.errors import NotAnSAEError

D_IN, D_SAE, K = 8, 24, 3
WEIGHTS = "sae_weights.safetensors"


def rows(n: int = 400, seed: int = 0) -> Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)) + 2.0


def make(name: str, **options: object) -> SAE:
    sae = new(name, {"k": K}, d_in=D_IN, d_sae=D_SAE, normalize="none", **options)
    sae.initialize(rows(), torch.Generator().manual_seed(1))
    return sae.eval()


def saelens_folder(sae: SAE, folder: Path, **changes: object) -> Path:
    """The files that SAELens would write, with other entries of cfg.json."""
    sae_core.save(sae, folder)
    (folder / "granary.json").unlink()
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**cfg, **changes}))
    return folder


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Other tensors, written as any other tool does."""
    save_file({name: t.contiguous() for name, t in change(load_file(path)).items()}, path)


# -- dtypes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vanilla", "topk", "gated"])
def test_half_precision_is_converted_before_anything_is_computed(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    changes = {"apply_b_dec_to_input": False, **({"rescale_acts_by_decoder_norm": True} if name == "topk" else {})}
    saelens_folder(make(name), tmp_path, **changes)
    rewrite(tmp_path / WEIGHTS, lambda held: {n: (1.3 * t).to(dtype) for n, t in held.items()})
    half = sae_core.load(tmp_path)
    rewrite(tmp_path / WEIGHTS, lambda held: {n: t.float() for n, t in held.items()})
    exact, x = sae_core.load(tmp_path), rows(seed=5)
    with torch.no_grad():
        assert torch.equal(half(x).x_hat, exact(x).x_hat)


def test_a_float32_threshold_beside_bfloat16_weights_as_saelens_writes_it(tmp_path: Path) -> None:
    saelens_folder(make("jumprelu", l0_target=K), tmp_path)  # SAELens#728
    rewrite(
        tmp_path / WEIGHTS, lambda held: {n: t + 0.3 if n == "threshold" else t.bfloat16() for n, t in held.items()}
    )
    mixed = sae_core.load(tmp_path)
    rewrite(tmp_path / WEIGHTS, lambda held: {n: t.float() for n, t in held.items()})
    exact, x = sae_core.load(tmp_path), rows(seed=5)
    with torch.no_grad():
        assert torch.equal(mixed(x).x_hat, exact(x).x_hat)


# -- exact names, shapes, dtypes, values -----------------------------------------------------------------------

DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "W_dec that broadcasts": (lambda t: {**t, "W_dec": t["W_dec"][:1]}, r"W_dec is \(1, 8\), expected \(24, 8\)"),
    "b_enc that broadcasts": (lambda t: {**t, "b_enc": t["b_enc"][:1]}, r"b_enc is \(1,\), expected \(24,\)"),
    "b_dec that is a number": (lambda t: {**t, "b_dec": t["b_dec"][0]}, r"b_dec is \(\), expected \(8,\)"),
    "a transposed W_enc": (lambda t: {**t, "W_enc": t["W_enc"].t()}, r"W_enc is \(24, 8\), expected \(8, 24\)"),
    "integers": (lambda t: {n: (9 * v).to(torch.int8) for n, v in t.items()}, "weights are int8: expected one of"),
    "mixed dtypes": (lambda t: {**t, "b_enc": t["b_enc"].half()}, "weights are float16, float32: expected one of"),
    "NaN": (lambda t: {**t, "W_dec": t["W_dec"] * float("nan")}, "NaN or Inf in W_dec"),
    "too large for float32": (lambda t: {n: v.double() * 1e200 for n, v in t.items()}, "NaN or Inf in "),
    "an extra tensor": (lambda t: {**t, "b_more": t["b_enc"] + 0}, "they are 'W_dec, W_enc, b_dec, b_enc, b_more'"),
    "a missing tensor": (
        lambda t: {n: v for n, v in t.items() if n != "b_dec"},
        "expected 'W_dec, W_enc, b_dec, b_enc'",
    ),
    "no tensor": (lambda t: {}, "they are ''|more weights than the 0"),
}


@pytest.mark.parametrize("ours", [True, False], ids=["granary.json", "cfg.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_do_not_fit_exactly_are_refused(damage: str, ours: bool, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    if ours:
        sae_core.save(make("topk"), tmp_path)
        record = json.loads((tmp_path / "granary.json").read_text())
        del record["sha256"]  # as files of earlier versions had none
        (tmp_path / "granary.json").write_text(json.dumps({**record, "format": 1}))
    else:
        saelens_folder(make("topk"), tmp_path)
    rewrite(tmp_path / WEIGHTS, change)
    with pytest.raises(NotAnSAEError, match=message):
        sae_core.load(tmp_path)


DEEP = json.loads("[" * 90 + "]" * 90)


@pytest.mark.parametrize(
    "change",
    [
        *(
            {name: value}
            for name in ("d_in", "d_sae", "k")
            for value in (None, True, "8", 8.5, -1, 0, 2**70, 2**40, [], {})
        ),
        *({"architecture": value} for value in (None, [], {}, 7, DEEP)),
        *({"normalize_activations": value} for value in ([], {}, 7, DEEP)),
        *({name: 1} for name in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm")),
        {"activation_fn_str": "topk", "activation_fn_kwargs": 7},
        {"activation_fn": DEEP},
    ],
    ids=lambda change: json.dumps(change)[:40],
)
def test_absurd_entries_of_cfg_json_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(NotAnSAEError) as caught:
        sae_core.load(saelens_folder(make("topk"), tmp_path, **change))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("file", ["granary.json", "cfg.json"])
def test_json_that_is_nested_without_end_is_refused(file: str, tmp_path: Path) -> None:
    saelens_folder(make("topk"), tmp_path)
    (tmp_path / file).write_text('{"a":' * 100_000)
    with pytest.raises(NotAnSAEError, match="not valid JSON"):
        sae_core.load(tmp_path)


# -- checksums -------------------------------------------------------------------------------------------------

FORMS: dict[str, tuple[Callable[[SAE, Path], object], Callable[[Path], SAE], tuple[str, ...]]] = {
    "inference": (sae_core.save, sae_core.load, ("granary.json", WEIGHTS)),
    "native": (sae_core.save_native, sae_core.load_native, ("sae.json", "sae.safetensors")),
    "saelens": (saelens_folder, sae_core.load, (WEIGHTS,)),
    "sparsify": (sae_core.save_sparsify, sae_core.load, ("sae.safetensors",)),
}


def same(a: SAE, b: SAE) -> bool:
    return a.config == b.config and all(
        torch.equal(t, other) for t, other in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("form", FORMS)
def test_an_altered_file_of_ours_is_never_another_sae(form: str, tmp_path: Path) -> None:
    write, read, files = FORMS[form]
    sae, chance = make("topk"), random.Random(0)
    write(sae, tmp_path)
    expected, refused = read(tmp_path), 0
    for i in range(120):
        path = tmp_path / files[i % len(files)]
        content = path.read_bytes()
        path.write_bytes(mutate_bytes(content, chance))
        try:
            assert same(read(tmp_path), expected), f"mutation {i} of {path.name}"
        except NotAnSAEError:
            refused += 1
        path.write_bytes(content)
    assert refused > 90


@pytest.mark.parametrize("form", FORMS)
def test_the_same_sae_gives_the_same_bytes(form: str, tmp_path: Path) -> None:
    write, _, _ = FORMS[form]
    for i in range(8):
        write(make("topk"), tmp_path / str(i))
    for path in (tmp_path / "0").iterdir():
        assert len({(tmp_path / str(i) / path.name).read_bytes() for i in range(8)}) == 1, path.name


def test_weights_of_another_sae_beside_the_record_are_refused(tmp_path: Path) -> None:
    for name, k in (("a", 3), ("b", 4)):
        sae_core.save(new("topk", d_in=D_IN, d_sae=D_SAE, k=k), tmp_path / name)
    sae_core.save(make("topk"), tmp_path / "b")
    (tmp_path / "b" / WEIGHTS).replace(tmp_path / "a" / WEIGHTS)
    with pytest.raises(NotAnSAEError, match="does not hold what was written"):
        sae_core.load(tmp_path / "a")


# -- what other tools mean -------------------------------------------------------------------------------------


def test_signed_coders_of_sparsify_keep_the_largest_magnitudes(tmp_path: Path) -> None:
    sae_core.save_sparsify(make("topk"), tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "signed": True}))
    sae, x = sae_core.load(tmp_path), rows(50, seed=5)
    pre_acts = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    expected = torch.zeros_like(pre_acts).scatter(1, pre_acts.abs().topk(K).indices, 1.0) * pre_acts
    assert bool((expected < 0).any())
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x).dense(), expected, rtol=1e-5, atol=1e-5)
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "signed": True, "transcode": True}))
    with pytest.raises(NotAnSAEError, match="have no counterpart here"):
        sae_core.load(tmp_path)


def test_a_jumprelu_of_saelens_never_gives_negative_codes(tmp_path: Path) -> None:
    saelens_folder(make("jumprelu", l0_target=4.0), tmp_path)
    rewrite(tmp_path / WEIGHTS, lambda held: {**held, "threshold": torch.linspace(-2, 2, D_SAE)})
    sae, x = sae_core.load(tmp_path), rows(50, seed=5)
    with torch.no_grad():
        pre_acts = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        expected = torch.relu(pre_acts) * (pre_acts > torch.linspace(-2, 2, D_SAE))
        torch.testing.assert_close(sae.encode(x).dense(), expected, rtol=1e-5, atol=1e-5)


def test_an_exported_matching_pursuit_loads_again(tmp_path: Path) -> None:
    sae, x = make("matching_pursuit"), rows(50, seed=5)
    again = sae_core.load(saelens_folder(sae, tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(again.encode(x).dense(), sae.encode(x).dense())
    assert again.type_name == "matching_pursuit"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual_threshold": 0.01}, "residual_threshold=0.01: expected 0 or false"),
        ({"stop_on_duplicate_support": True}, "stop_on_duplicate_support=True: expected 0"),
        ({"max_iterations": "3"}, "max_iterations is '3', expected int"),
    ],
)
def test_a_matching_pursuit_that_stops_elsewhere_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(NotAnSAEError, match=message):
        sae_core.load(saelens_folder(make("matching_pursuit"), tmp_path, **change))


@pytest.mark.parametrize(("factor", "loads"), [(1.0, True), (1.5, False)])
def test_the_scaling_factors_that_saelens_wrote_for_a_while(factor: float, loads: bool, tmp_path: Path) -> None:
    sae, x = make("vanilla"), rows(50, seed=5)
    saelens_folder(sae, tmp_path)
    rewrite(tmp_path / WEIGHTS, lambda held: {**held, "scaling_factor": torch.full((D_SAE,), factor)})
    if not loads:
        with pytest.raises(NotAnSAEError, match="scaling_factor"):
            sae_core.load(tmp_path)
        return
    with torch.no_grad():
        torch.testing.assert_close(sae_core.load(tmp_path)(x).x_hat, sae(x).x_hat)


def test_a_folder_of_an_early_saelens_with_all_its_entries_is_read(tmp_path: Path) -> None:
    """Then cfg.json held the whole training and no `architecture`; the firing rates lay beside it."""
    sae, x = make("vanilla"), rows(50, seed=5)
    saelens_folder(sae, tmp_path)
    early = {"model_name": "gpt2-small", "hook_name": "blocks.7.hook_resid_pre", "hook_layer": 7, "context_size": 512}
    early |= {"d_in": D_IN, "d_sae": D_SAE, "activation_fn": "relu", "normalize_sae_decoder": True, "noise_scale": 0.0}
    early |= {
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "dtype": "torch.float32",
        "l1_coefficient": 5,
    }
    (tmp_path / "cfg.json").write_text(json.dumps({**early, "from_pretrained_path": None, "training_tokens": 10**6}))
    save_file({"sparsity": torch.zeros(D_SAE)}, tmp_path / "sparsity.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(sae_core.load(tmp_path)(x).x_hat, sae(x).x_hat)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_coder_of_sparsify_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    sae_core.save_sparsify(make("topk"), tmp_path)
    rewrite(tmp_path / "sae.safetensors", lambda held: {n: t.to(dtype) for n, t in held.items()})
    half = sae_core.load(tmp_path)
    rewrite(tmp_path / "sae.safetensors", lambda held: {n: t.float() for n, t in held.items()})
    assert same(half, sae_core.load(tmp_path))


def test_a_threshold_is_never_dropped(tmp_path: Path) -> None:
    """A batch-top-k SAE described as a standard one would load and compute another function."""
    saelens_folder(make("jumprelu", l0_target=4.0), tmp_path, architecture="standard")
    with pytest.raises(NotAnSAEError, match="they are 'W_dec, W_enc, b_dec, b_enc, threshold', expected"):
        sae_core.load(tmp_path)


def test_a_folder_of_folders_names_them(tmp_path: Path) -> None:
    for layer in (10, 2):
        sae_core.save_sparsify(make("topk"), tmp_path / f"layers.{layer}")
    (tmp_path / ".huggingface").mkdir()  # what the hub's client leaves in a download
    with pytest.raises(
        NotAnSAEError, match=r"holds no SAE: its subfolders do, give one of them: 'layers.2, layers.10'"
    ):
        sae_core.load(tmp_path)
    with pytest.raises(NotAnSAEError, match="this is a file"):
        sae_core.load(tmp_path / "layers.2" / "cfg.json")
    with pytest.raises(NotAnSAEError, match="there is no such folder"):
        sae_core.load("someone/some-sae")
