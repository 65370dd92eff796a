"""`sae-analyze stats --logits`: decoder rows through the head of the cache's model, against direct products."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from command_kit import invoke, refused
from sae_kit import saved

from sae_granary.analyze.cli import app
from sae_granary.analyze.encoding.encode import encode_cache
from sae_granary.analyze.errors import AnalyzeError
from sae_granary.analyze.latents import logits as logits_module
from sae_granary.analyze.latents.logits import logit_effects, with_logits
from sae_granary.analyze.latents.stats import find_stats
from sae_granary.analyze.source import open_source
from sae_granary.models.errors import ModelError
from sae_granary.models.language.unembedding import final_norm, folded
from sae_granary.sae_core import Codes, Pattern


def test_the_ends_of_the_logits_by_hand(monkeypatch) -> None:
    rows, W_U = torch.tensor([[1.0, 0.0], [0.0, -2.0], [1.0, 1.0]]), torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, -1.0]])
    monkeypatch.setattr(logits_module, "BLOCK_NUMBERS", 6)  # two latents at once
    found = logit_effects(rows, W_U, n=2)
    assert found["logit_tokens_top"].tolist() == [[0, 2], [2, 0], [1, 0]]
    assert found["logit_values_top"].tolist() == [[3, 2], [2, 0], [6, 3]]
    assert found["logit_tokens_bottom"].tolist() == [[1, 2], [1, 0], [2, 0]]
    assert found["logit_values_bottom"].tolist() == [[1, 2], [-10, 0], [1, 3]]


@pytest.mark.parametrize("d_model", [8, 7])
@pytest.mark.parametrize("kind", [torch.nn.LayerNorm, torch.nn.RMSNorm])
def test_a_norms_weight_and_centering_are_folded(kind, d_model) -> None:
    norm, W_U = kind(d_model), torch.randn(d_model, 5)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    x, direction = torch.randn(d_model), torch.randn(d_model)
    centered = kind is torch.nn.LayerNorm
    divisor = x.var(unbiased=False).sqrt() if centered else x.square().mean().sqrt()
    moved = direction - direction.mean() if centered else direction
    expected = (moved * norm.weight.detach()) @ W_U
    torch.testing.assert_close(direction @ folded(norm, W_U), expected, atol=1e-4, rtol=1e-4)
    # Up to its divisor the norm is linear: the same from what it returns.
    bias = getattr(norm, "bias", None)
    difference = (norm(x) - (0 if bias is None else bias)) * divisor
    torch.testing.assert_close(difference.detach() @ W_U, x @ folded(norm, W_U), atol=1e-3, rtol=1e-3)


def saved_model(folder: Path, kind: str) -> torch.nn.Module:
    """A model 16 wide with random weights, those of its norms too."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 8}
    torch.manual_seed(0)
    if kind == "gpt2":
        model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    elif kind == "llama":
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes))
    else:
        model = tf.BertForMaskedLM(tf.BertConfig(**sizes))
    for name, parameter in model.named_parameters():
        if "norm" in name.lower() or "ln_f" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_logit_effects_of_a_model_equal_a_direct_product(kind, make_cache, tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", kind)
    source = open_source(saved(tmp_path / "sae", d_sae=24), make_cache(n_docs=40), device="cpu")
    first = find_stats(source, lambda: encode_cache(source, source.place / "codes"))
    found, has_norm = with_logits(source, first, str(tmp_path / "model"))
    F = source.sae.config.d_sae
    with torch.no_grad():  # what one unit of each latent adds to a reconstructed row
        one, none = (source.sae.decode(Codes(values, Pattern(F, F))) for values in (torch.eye(F), torch.zeros(F, F)))
    rows = one - none
    if kind == "gpt2":
        rows = (rows - rows.mean(1, keepdim=True)) * model.transformer.ln_f.weight.detach()
    elif kind == "llama":
        rows = rows * model.model.norm.weight.detach()
    assert has_norm == (kind != "bert")
    expected = (rows @ model.get_output_embeddings().weight.detach().t()).numpy()
    np.testing.assert_allclose(found.logit_values_top, -np.sort(-expected, axis=1)[:, :10], atol=1e-5)
    np.testing.assert_allclose(found.logit_values_bottom, np.sort(expected, axis=1)[:, :10], atol=1e-5)
    at = np.take_along_axis(expected, found.logit_tokens_bottom, 1)
    np.testing.assert_allclose(at, found.logit_values_bottom, atol=1e-5)
    given = [str(source.folder), "--cache", str(source.cache.path), "--device", "cpu"]
    done = invoke(app, "stats", *given, "--logits", "--model", tmp_path / "model")
    assert ("with the final norm's weight" if has_norm else "without the final norm") in done.output
    stored = find_stats(source, lambda: pytest.fail("encoded again"))
    np.testing.assert_array_equal(stored.logit_tokens_top, found.logit_tokens_top)
    shown = invoke(app, "show", *given, "--latent", "3")
    best = f"{found.logit_tokens_top[3, 0]} ({found.logit_values_top[3, 0]:.2f})"  # this cache has no strings of tokens
    assert f"raises logits of: {best}, " in shown.output


def test_logit_effects_are_in_raw_units(make_cache, tmp_path: Path) -> None:
    saved_model(tmp_path / "model", "gpt2")
    source = open_source(saved(tmp_path / "sae", d_sae=24), make_cache(n_docs=40), device="cpu")
    stats = find_stats(source, lambda: encode_cache(source, source.place / "codes"))
    once = with_logits(source, stats, str(tmp_path / "model"))[0].logit_values_top
    source.sae.normalizer.scale.fill_(4.0)  # rows are multiplied by 4 in front of the SAE
    scaled = with_logits(source, stats, str(tmp_path / "model"))[0].logit_values_top
    np.testing.assert_allclose(scaled, once / 4, rtol=1e-5)


def test_the_norm_behind_the_blocks_is_found() -> None:
    gemma = tf.Gemma2Config(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=4,
                            num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(gemma)
    assert final_norm(model.base_model, 8) is model.model.norm
    assert final_norm(model.base_model, 9) is None
    torch.nn.init.constant_(model.model.norm.weight, 0.5)  # stored as what is added to 1
    torch.testing.assert_close(folded(model.model.norm, torch.eye(8)), 1.5 * torch.eye(8), atol=1e-4, rtol=1e-4)


def test_what_has_no_logits_says_so_in_one_line(make_cache, tmp_path: Path) -> None:
    cache, sae = make_cache(), saved(tmp_path / "sae", d_sae=24)
    given = ["stats", str(sae), "--cache", str(cache), "--device", "cpu"]
    skipped = invoke(app, *given, "--logits")
    [line] = [line for line in skipped.output.splitlines() if "no logit effects" in line]
    assert "the model 'toy-model' that the cache was harvested from cannot be found" in line
    assert "--model" in line
    named = invoke(app, *given, "--logits", "--model", tmp_path / "none", code=2)
    assert "is not there: no such folder" in named.output
    refused(app, *given, "--model", "gpt2")
    source = open_source(sae, cache, device="cpu")
    stats = find_stats(source, lambda: pytest.fail("encoded again"))
    assert stats.logit_tokens_top is None
    with pytest.raises(ModelError):
        with_logits(source, stats)
    source.cache.unit = "text"
    with pytest.raises(AnalyzeError, match="one embedding per text, which no head reads"):
        with_logits(source, stats)
