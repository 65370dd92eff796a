"""Every architecture: each real token once, with its place, and its activation equal to a direct forward pass."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from harvest_kit import ARCHITECTURES, N_LAYERS, build_model, config_of, naive_rows, row_errors, texts
from safetensors.torch import load_file, save_file
from transformers import OPTConfig, OPTModel, PreTrainedModel

from sae_granary import open_cache
from sae_granary.common.rows import FLAG_SPECIAL, FLAG_WINDOW_START
from sae_granary.harvest.run import harvest_activations
from sae_granary.models.config import ModelConfig
from sae_granary.models.errors import ModelError
from sae_granary.models.hooks import Capture, Hook
from sae_granary.models.load import load_base
from sae_granary.models.locate import locate

LAYER = 1
CTX_LEN = 16
SETTINGS = {"documents": "auto", "layers": LAYER, "ctx_len": CTX_LEN, "batch_tokens": 128}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus"
    path.mkdir()
    for i, text in enumerate(texts(40)):
        (path / f"{i:03d}.txt").write_text(text)
    return path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_equal_a_direct_forward_pass(architecture: str, corpus: Path, tmp_path: Path) -> None:
    model = build_model(tmp_path / architecture, architecture)
    result = harvest_activations(config_of(model, corpus, tmp_path / "out", **SETTINGS), quiet=True)
    want = list(naive_rows(model, texts(40), LAYER, CTX_LEN))
    got = open_cache(tmp_path / "out")
    rows = slice(0, got.n_rows)

    assert got.n_rows == result.n_rows == len(want)
    assert got.column("token_id")[rows].tolist() == [row.token_id for row in want]
    assert got.column("doc_id")[rows].tolist() == [row.doc_id for row in want]
    assert got.column("window")[rows].tolist() == [row.window for row in want]
    assert got.column("position")[rows].tolist() == [row.position for row in want]
    assert got.column("doc_position")[rows].tolist() == [row.doc_position for row in want]
    flags = got.column("flags")[rows]
    assert ((flags & FLAG_SPECIAL) > 0).tolist() == [row.special for row in want]
    assert ((flags & FLAG_WINDOW_START) > 0).tolist() == [row.position == 0 for row in want]
    assert row_errors(got.hook(f"layer_{LAYER}")[rows], np.stack([row.vector for row in want])).max() < 1e-5
    assert got.manifest.provenance["model"]["n_layers"] == N_LAYERS
    assert got.manifest.provenance["model"]["is_decoder"] == (architecture in ("gpt2", "llama", "qwen2", "qwen3"))


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_bfloat16_is_close_and_stored_without_loss(architecture: str, corpus: Path, tmp_path: Path) -> None:
    model = build_model(tmp_path / architecture, architecture)
    harvest_activations(config_of(model, corpus, tmp_path / "out", compute_dtype="bfloat16", **SETTINGS), quiet=True)
    got = open_cache(tmp_path / "out")
    assert got.dtype == "bfloat16"
    want = np.stack([row.vector for row in naive_rows(model, texts(40), LAYER, CTX_LEN)])
    errors = row_errors(got.hook()[0 : got.n_rows], want)
    assert errors.mean() < 2e-2
    assert errors.max() < 5e-2


def test_several_hook_points_share_the_rows(corpus: Path, tmp_path: Path) -> None:
    model = build_model(tmp_path / "bert", "bert")
    hooks = ("encoder.layer.1.attention.output", "encoder.layer.*.output.dense:in")
    settings = {**SETTINGS, "layers": (0, 2), "hooks": hooks}
    harvest_activations(config_of(model, corpus, tmp_path / "out", **settings), quiet=True)
    got = open_cache(tmp_path / "out")
    assert {name: point.d_in for name, point in got.hook_points.items()} == {
        "layer_0": 32, "encoder.layer.0.output.dense.in": 64, "encoder.layer.1.attention.output": 32,
        "encoder.layer.1.output.dense.in": 64, "layer_2": 32, "encoder.layer.2.output.dense.in": 64,
    }  # fmt: skip
    for layer in (0, 2):
        vectors = np.stack([row.vector for row in naive_rows(model, texts(40), layer, CTX_LEN)])
        assert row_errors(got.hook(f"layer_{layer}")[0 : got.n_rows], vectors).max() < 1e-5


def test_modules_behind_the_last_hook_do_not_run(tmp_path: Path) -> None:
    located = locate(ModelConfig(str(build_model(tmp_path / "bert", "bert"))))
    base = load_base(located, "float32", "cpu")
    ran: list[str] = []
    for path in ("encoder.layer.1", "encoder.layer.2", "pooler"):
        base.get_submodule(path).register_forward_hook(lambda module, args, output, path=path: ran.append(path))
    seen: list[str] = []
    capture = Capture(base, [Hook("layer_1", "encoder.layer.1")])
    with torch.inference_mode():
        capture.run(torch.ones((2, 5), dtype=torch.long), None, lambda hook, value: seen.append(hook.name))
    assert (ran, seen) == (["encoder.layer.1"], ["layer_1"])


def test_random_weights_are_refused(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "bert", "bert")
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layer.1" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"do not fit its config: encoder\.layer\.1.* random weights"):
        load_base(locate(ModelConfig(str(folder))), "float32", "cpu")


def test_a_decoder_only_model_whose_stack_is_called_decoder_may_miss_no_weights(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=50, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2
    )
    folder = tmp_path / "opt"
    OPTModel(config).save_pretrained(folder)
    load_base(locate(ModelConfig(str(folder))), "float32", "cpu")
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="random weights"):
        load_base(locate(ModelConfig(str(folder))), "float32", "cpu")


def test_models_that_are_loaded_by_threads_leave_transformers_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It replaces functions of its own and of torch for as long as it loads."""
    located = locate(ModelConfig(str(build_model(tmp_path / "bert", "bert"))))
    before = PreTrainedModel.tie_weights
    monkeypatch.setattr(PreTrainedModel, "tie_weights", before)
    switch = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-5)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda i: load_base(located, "float32", "cpu"), range(40)))
    finally:
        sys.setswitchinterval(switch)
    assert PreTrainedModel.tie_weights is before
