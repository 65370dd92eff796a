"""`--unit text` equals SentenceTransformer.encode; token level of the same folder equals its inner transformer."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harvest_kit import build_model, row_errors, texts, tiny_tokenizer

from sae_granary import open_cache
from sae_granary.cache.errors import CacheError
from sae_granary.common.errors import ConfigError
from sae_granary.harvest.config import HarvestConfig, TextConfig
from sae_granary.harvest.prepare import prepare
from sae_granary.harvest.run import harvest_activations
from sae_granary.models.config import ModelConfig, TokenConfig, WhereConfig
from sae_granary.models.demo import check_demo_weights, demo_model_path
from sae_granary.models.errors import ModelError

DOCS = [*texts(30, seed=1, longest=40), "a", "long " * 400, "Ünïcode, 東京 and emoji 🙂"]


@pytest.fixture(scope="module")
def minilm() -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(demo_model_path()), device="cpu")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join([*DOCS[:5], "", *DOCS[5:]]))
    return path


def config_of(model: str, corpus: Path, out: Path, where: WhereConfig) -> HarvestConfig:
    return HarvestConfig(
        ModelConfig(model, device="cpu"), where, TextConfig(str(corpus), documents="line"), out=out
    )  # fmt: skip


def test_pooled_rows_equal_encode(minilm: Any, corpus: Path, tmp_path: Path) -> None:
    result = harvest_activations(config_of("demo", corpus, tmp_path / "out", WhereConfig(unit="text")), quiet=True)
    got = open_cache(tmp_path / "out")
    assert (got.unit, result.n_rows, dict(result.skipped)["empty"]) == ("text", len(DOCS), 1)
    want = minilm.encode(DOCS, convert_to_numpy=True)
    assert row_errors(got.hook()[0 : got.n_rows], want).max() < 1e-5
    np.testing.assert_allclose(np.linalg.norm(got.hook()[0 : got.n_rows], axis=1), 1.0, rtol=1e-5)
    assert got.column("doc_id")[0 : got.n_rows].tolist() == [*range(5), *range(6, len(DOCS) + 1)]
    assert (got.column("token_id")[0 : got.n_rows] == -1).all()
    assert got.document(5).text == DOCS[5]


@pytest.mark.parametrize("kind", ["mixes padding in", "changes itself"])
def test_embeddings_are_those_of_the_text_alone(corpus: Path, tmp_path: Path, kind: str) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer, BigBirdConfig, FNetConfig

    tokenizer = tiny_tokenizer("bert")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    attention = {"block_size": 4, "num_random_blocks": 1, "num_attention_heads": 4}
    config: Any = FNetConfig(**sizes) if kind == "mixes padding in" else BigBirdConfig(**sizes, **attention)
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    where = WhereConfig(unit="text")
    harvest_activations(config_of(str(tmp_path / "model"), corpus, tmp_path / "out", where), quiet=True)
    got, want = open_cache(tmp_path / "out"), []
    for text in DOCS:
        fresh: Any = AutoModel.from_pretrained(tmp_path / "model").eval()
        ids = AutoTokenizer.from_pretrained(tmp_path / "model")(text, truncation=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            want.append(fresh(input_ids=ids).last_hidden_state[0].mean(0).numpy())
    assert row_errors(got.hook()[0 : got.n_rows], np.stack(want)).max() < 1e-5
    if kind == "mixes padding in":
        assert got.manifest.provenance["compute"]["batching"] == "single"


@pytest.mark.parametrize("dense", [False, True])
def test_other_pooling_stacks_are_followed(corpus: Path, tmp_path: Path, dense: bool) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as models

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library, about its own older names
        transformer = models.Transformer(str(build_model(tmp_path / "bert", "bert")))
        pooling = models.Pooling(32, pooling_mode="cls" if dense else "max")
        stack = [transformer, pooling, models.Dense(32, 64)] if dense else [transformer, pooling]
        model = SentenceTransformer(modules=stack, device="cpu")
        model.save(str(tmp_path / "stack"))
    config = config_of(str(tmp_path / "stack"), corpus, tmp_path / "out", WhereConfig(unit="text"))
    prepared = prepare(config, lambda message: None)
    assert (prepared.widths_known, prepared.hooks[0].d_in) == (True, 64 if dense else 32)
    harvest_activations(config, quiet=True)
    got = open_cache(tmp_path / "out")
    assert row_errors(got.hook()[0 : got.n_rows], model.encode(DOCS, convert_to_numpy=True)).max() < 1e-5
    assert harvest_activations(config, quiet=True).already_complete
    file = tmp_path / "stack/1_Pooling/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pooling_mode": "mean"}))
    with pytest.raises(CacheError, match="model_config_xxh3"):  # other embeddings
        harvest_activations(config, quiet=True)


def test_token_level_of_the_demo_model_is_its_transformer(minilm: Any, corpus: Path, tmp_path: Path) -> None:
    import torch

    harvest_activations(config_of("demo", corpus, tmp_path / "out", WhereConfig(layers=(3,))), quiet=True)
    got = open_cache(tmp_path / "out")
    transformer, tokenizer = minilm[0].auto_model, minilm.tokenizer
    doc_id = got.column("doc_id")[0 : got.n_rows]
    for doc in (0, len(DOCS)):
        text = DOCS[0] if doc == 0 else DOCS[-1]
        ids = tokenizer([text], return_tensors="pt", padding=False, truncation=True)
        with torch.inference_mode():
            want = transformer(**ids, output_hidden_states=True).hidden_states[4][0].numpy()
        rows = np.flatnonzero(doc_id == doc)
        assert got.column("token_id")[rows].tolist() == ids["input_ids"][0].tolist()
        assert row_errors(got.hook()[rows], want).max() < 1e-5
    record = got.manifest.provenance["model"]
    assert (record["kind"], record["id"]) == ("sentence-transformer", "sentence-transformers/all-MiniLM-L6-v2")
    assert got.manifest.provenance["windows"]["ctx_len"] == 256
    long = np.flatnonzero(doc_id == len(DOCS) - 1)
    assert int(got.column("window")[long[-1]] - got.column("window")[long[0]]) == 1  # 400 words: two windows
    assert sorted(p for p in got.column("doc_position")[long].tolist() if p >= 0) == list(range(400))


def test_windows_are_refused_where_texts_are_pooled(corpus: Path, tmp_path: Path) -> None:
    config = config_of("demo", corpus, tmp_path / "out", WhereConfig(unit="text"))
    with pytest.raises(ConfigError, match="leave out --pack, --bos and --ctx-len"):
        prepare(replace(config, tokens=TokenConfig(ctx_len=64)), lambda message: None)


def test_demo_weights_are_checked(tmp_path: Path) -> None:
    check_demo_weights(demo_model_path())
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    with pytest.raises(ModelError, match=r"has sha256 .*, expected 53aa5117.*reinstall"):
        check_demo_weights(tmp_path)
