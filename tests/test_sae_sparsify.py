"""sparsify's files, without sparsify: names, orientation and refusals (`make interop` compares with the library)."""

import json
from pathlib import Path

import pytest
import torch
from sae_kit import new
from safetensors.torch import load_file

from sae_granary import sae_core
from sae_granary.sae_core.errors import NotAnSAEError, OptionError


def topk(**options: object) -> sae_core.SAE:
    sae = new("topk", d_in=8, d_sae=32, k=3, **options)
    sae.initialize(torch.randn(100, 8, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(0))
    return sae.eval()


def test_the_folder_holds_what_sparsify_reads_and_comes_back(tmp_path: Path) -> None:
    sae, x = topk(normalize="mean+dataset"), torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    sae_core.save_sparsify(sae, tmp_path, {"model_name": "m"})
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    expected = {
        "activation": "topk",
        "d_in": 8,
        "num_latents": 32,
        "k": 3,
        "transcode": False,
        "normalize_decoder": True,
    }
    assert {name: cfg[name] for name in expected} == expected
    tensors = load_file(tmp_path / "sae.safetensors")
    shapes = {"encoder.weight": (32, 8), "encoder.bias": (32,), "W_dec": (32, 8), "b_dec": (8,)}
    assert {name: tuple(t.shape) for name, t in tensors.items()} == shapes
    values, indices = ((x - tensors["b_dec"]) @ tensors["encoder.weight"].t() + tensors["encoder.bias"]).relu().topk(3)
    by_hand = torch.zeros(20, 32).scatter(1, indices, values) @ tensors["W_dec"] + tensors["b_dec"]
    torch.testing.assert_close(sae(x).x_hat, by_hand)
    torch.testing.assert_close(sae_core.load(tmp_path)(x).x_hat, by_hand)


def test_the_width_may_stand_as_an_expansion_factor(tmp_path: Path) -> None:
    sae_core.save_sparsify(topk(), tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "num_latents": 0, "expansion_factor": 4}))
    assert sae_core.load(tmp_path).config.d_sae == 32


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("batchtopk", {}, "type='batchtopk' cannot be written for sparsify.*it reads .*topk.*export to saelens"),
        ("vanilla", {}, "type='vanilla' cannot be written for sparsify"),
        ("topk", {"normalize": "unit_norm"}, "normalize='unit_norm' cannot be written"),
        ("transcoder", {"d_out": 5}, "d_out=5 cannot be written for sparsify: expected d_in=8"),
    ],
)
def test_what_sparsify_cannot_express_is_refused(
    name: str, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    sae = new(name, d_in=8, d_sae=32, **options)
    with pytest.raises(OptionError, match=message):
        sae_core.save_sparsify(sae, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "groupmax"}, "activation='groupmax' of cfg.json cannot be read; known: topk"),
        ({"skip_connection": True}, "skip_connection without transcode"),
        ({"k": None}, "do not describe a sparse coder"),
        ({"num_latents": 16}, "do not fit their configuration"),
    ],
)
def test_folders_without_a_counterpart_are_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    sae_core.save_sparsify(topk(), tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, **change}))
    with pytest.raises(NotAnSAEError, match=message):
        sae_core.load(tmp_path)
