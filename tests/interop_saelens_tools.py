"""SAELens' own tools on an SAE of ours, and a fine-tuning here that starts from an SAE of SAELens.

Run by `make interop`, in the peers' environment.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_cache
from datasets import Dataset
from lm_kit import CTX_LEN, demo_texts, harvest, trained_model
from sae_lens import SAE as LensSAE
from sae_lens import (
    ActivationsStore,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from test_train_log import Recorder
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_granary import open_cache, sae_core, train_sae
from sae_granary.train.publish.export import export

D_IN, D_SAE, K = 16, 48, 4


def hooked(folder: Path) -> HookedTransformer:
    """Our tiny GPT-2 in TransformerLens, without its own folding of weights."""
    hf, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config = HookedTransformerConfig(
        n_layers=2, d_model=64, n_ctx=CTX_LEN, d_head=16, n_heads=4, d_mlp=256, d_vocab=hf.config.vocab_size,
        act_fn="gelu_new", normalization_type="LN", device="cpu", eps=hf.config.layer_norm_epsilon,
    )  # fmt: skip
    model = HookedTransformer(config, tokenizer=tokenizer, default_padding_side="right")
    model.tokenizer.pad_token = model.tokenizer.eos_token = tokenizer.bos_token  # their store pads, ours has none
    model.load_state_dict(convert_gpt2_weights(hf, config), strict=False)
    return model.eval()


def test_the_store_and_the_evaluation_of_saelens_run_on_our_export(tmp_path: Path) -> None:
    """`from_sae` needs context_size and prepend_bos of the metadata; the FVU is that of our own evaluation."""
    folder = trained_model(tmp_path / "model", "gpt2")
    cache = harvest(folder, tmp_path / "cache")
    settings = {"cache": str(cache), "runs_dir": str(tmp_path / "runs"), "name": "run"}
    run = train_sae(**settings, type="topk", k=8, d_sae=256, batch_size=256, steps=200, lr=3e-3)
    sae = LensSAE.load_from_disk(export(run.folder, "saelens", tmp_path / "out"))
    model, texts = hooked(folder), Dataset.from_dict({"text": demo_texts()})
    store = ActivationsStore.from_sae(
        model, sae, texts, streaming=False, store_batch_size_prompts=4, n_batches_in_buffer=4, total_tokens=1000
    )
    assert store.context_size == CTX_LEN
    assert store.prepend_bos
    assert store.training_context_size == CTX_LEN - 1  # the first position is an attention sink, left out of training
    metrics, _ = run_evals(sae, store, model, ActivationScaler(), get_eval_everything_config(4, 2, 2), verbose=False)
    assert metrics["sparsity"]["l0"] == pytest.approx(8, abs=0.5)
    explained = metrics["reconstruction_quality"]["explained_variance"]
    assert 1 - explained == pytest.approx(run.summary["eval"]["fvu"], abs=0.1)
    assert metrics["model_performance_preservation"]["ce_loss_score"] > 0.5


def lens_sae(kind: str, rows: Tensor) -> Any:
    """An SAE of theirs after some steps of training, with decoder rows of uneven norms."""
    torch.manual_seed(0)
    sizes = {"d_in": D_IN, "d_sae": D_SAE}
    if kind == "gated":
        sae: Any = GatedTrainingSAE(GatedTrainingSAEConfig(**sizes, decoder_init_norm=1.0))
    else:
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**sizes, k=K))
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        if kind == "gated":  # the sum of their gate's own reconstruction and the gated one
            x_hat, gate = sae.decode(sae.encode(rows)), torch.relu((rows - sae.b_dec) @ sae.W_enc + sae.b_gate)
            loss = (x_hat - rows).square().sum(1).mean() + (sae.decode(gate) - rows).square().sum(1).mean()
        else:
            loss = (sae.decode(sae.encode(rows)) - rows).square().sum(1).mean()
        loss.backward()
        optimizer.step()
    norms = sae.W_dec.detach().norm(dim=1)
    assert float(norms.max() / norms.min()) > 1.02
    return sae


@pytest.mark.parametrize("kind", ["gated", "topk"])
def test_fine_tuning_starts_at_the_fvu_of_the_saelens_sae(kind: str, tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache")
    x = torch.tensor(open_cache(cache).hook("layer_3")[:2000])
    lens_sae(kind, x).save_inference_model(tmp_path / "lens")
    theirs, recorder = LensSAE.load_from_disk(tmp_path / "lens"), Recorder()
    options = {"k": K} if kind == "topk" else {}
    run = train_sae(
        cache=str(cache), runs_dir=str(tmp_path), type=kind, d_sae=D_SAE, init_from=str(tmp_path / "lens"), steps=1,
        lr=1e-30, warmup_steps=0, batch_size=64, name="run", sinks=[recorder], **options,
    )  # fmt: skip
    (told,) = [text for text in recorder.messages if text.startswith("init_from=")]
    at_start, loaded = (float(number) for number in re.findall(r"\d\.\d{4}", told))
    assert at_start == pytest.approx(loaded, abs=2e-4)
    with torch.no_grad():
        ours = sae_core.load(run.folder)(x).x_hat
        error = (ours - theirs(x)).norm(dim=1) / x.norm(dim=1)
    assert float(error.quantile(0.99)) < 1e-4
    assert "selected by" not in told
