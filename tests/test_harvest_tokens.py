"""Which tokens a harvest sees and how they are marked: as the model's own library, its own tokenizer, its own flags."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_kit import refused
from harvest_kit import CutOff, build_model, cut_off_after, row_errors, texts

from sae_granary import open_cache
from sae_granary.cache.errors import SelectionError
from sae_granary.cache.load.selection import Filters, Holdout, Selection, account
from sae_granary.common.rows import FLAG_CONTROL, FLAG_SPECIAL
from sae_granary.harvest import prepare as harvest_prepare
from sae_granary.harvest import spec as harvest_spec
from sae_granary.harvest.cli import app
from sae_granary.harvest.run import harvest_activations
from sae_granary.models.config import ModelConfig
from sae_granary.models.errors import ModelError
from sae_granary.models.locate import locate
from sae_granary.models.tokens.tokenizer import load_tokenizer
from sae_granary.models.tokens.vocabulary import checked

DOCS = [text.title() for text in texts(12, seed=3, longest=40)]
PROMPT = "the quick "


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus.txt").write_text("\n".join(DOCS))
    return tmp_path / "corpus.txt"


def harvest(model: Path, corpus: Path, out: Path, **settings: Any) -> Any:
    settings = {"layers": 2} | settings if settings.get("unit") != "text" else settings
    harvest_activations(
        model=str(model), dataset=str(corpus), documents="line", out=out, device="cpu", quiet=True, **settings
    )
    return open_cache(out)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def sentence_transformer(folder: Path, no_pad: bool = False, **defaults: Any) -> Path:
    """Mean pooling over a tiny BERT that writes texts in lower case."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    bert = Transformer(str(build_model(folder / "bert", "bert")), do_lower_case=True)
    SentenceTransformer(modules=[bert, Pooling(32)], device="cpu").save(str(folder / "sentence"))
    change(folder / "sentence" / "sentence_bert_config.json", do_lower_case=True)
    change(folder / "sentence" / "config_sentence_transformers.json", **defaults)
    if no_pad:
        settings = folder / "sentence" / "tokenizer_config.json"
        settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "pad_token"}))
    return folder / "sentence"


@pytest.mark.parametrize("defaults", [{}, {"prompts": {"x": PROMPT}, "default_prompt_name": "x", "truncate_dim": 8}])
def test_token_rows_are_those_of_encode(corpus: Path, tmp_path: Path, defaults: dict[str, Any]) -> None:
    from sentence_transformers import SentenceTransformer

    path = sentence_transformer(tmp_path, **defaults)
    # Saving writes the changed tokenizer; the setting alone must do.
    build_model(tmp_path / "plain", "bert")
    (path / "tokenizer.json").write_text((tmp_path / "plain" / "tokenizer.json").read_text())
    model = SentenceTransformer(str(path), device="cpu")
    wanted = model.encode(DOCS, output_value="token_embeddings")
    got = harvest(path, corpus, tmp_path / "out")
    assert [int((got.column("doc_id")[0 : len(got)] == i).sum()) for i in range(len(DOCS))] == [*map(len, wanted)]
    assert row_errors(got.hook()[0 : len(got)], np.concatenate([w.numpy() for w in wanted])).max() < 1e-5
    assert (got.column("token_id")[0 : len(got)] != got.vocabulary.index("[UNK]")).all()
    assert got.document(0).text == DOCS[0]
    assert got.manifest.fingerprint.get("prompt") == got.manifest.provenance["windows"].get("prompt")
    assert got.manifest.fingerprint.get("prompt") == (PROMPT if defaults else None)
    pooled = harvest(path, corpus, tmp_path / "pooled", unit="text")
    assert pooled.hook_points["sentence_embedding"].d_in == (8 if defaults else 32)
    assert row_errors(pooled.hook()[0 : len(pooled)], model.encode(DOCS)).max() < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"config_args": {"hidden_act": "relu", "layer_norm_eps": 0.1}},
        {"config_kwargs": {"layer_norm_eps": 0.1}, "model_kwargs": {"attn_implementation": "eager"}},
        {"model_args": {"add_pooling_layer": False, "dtype": "float32", "trust_remote_code": True}},
        {"max_seq_length": 128, "tokenizer_args": {"model_max_length": 6}},
        {"max_seq_length": 6, "processor_kwargs": {"cls_token": "[SEP]"}},
        {"max_seq_length": None},
    ],
)
def test_what_a_sentence_transformer_is_loaded_with(corpus: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    from sentence_transformers import SentenceTransformer

    path = sentence_transformer(tmp_path)
    (path / "sentence_bert_config.json").write_text(json.dumps(settings))
    wanted = SentenceTransformer(str(path), device="cpu").encode(DOCS, output_value="token_embeddings")
    got = harvest(path, corpus, tmp_path / "out")
    doc, window = got.column("doc_id")[0 : len(got)], got.column("window")[0 : len(got)]
    first = np.concatenate([np.flatnonzero(window == window[doc == i].min()) for i in range(len(DOCS))])
    assert len(first) == sum(map(len, wanted))
    assert row_errors(got.hook()[0 : len(got)][first], np.concatenate([w.numpy() for w in wanted])).max() < 1e-5
    named = {key for key in settings if key != "max_seq_length"}
    assert ("loaded_with" in got.manifest.fingerprint) == bool(named)


def test_what_a_sentence_transformer_cannot_be_loaded_with_is_one_line(corpus: Path, tmp_path: Path) -> None:
    path = sentence_transformer(tmp_path)
    for settings in ({"model_args": {"foo": 1}}, {"config_args": {"num_hidden_layers": "many"}}):
        (path / "sentence_bert_config.json").write_text(json.dumps(settings))
        with pytest.raises(ModelError):
            harvest(path, corpus, tmp_path / "out")


def test_a_sentence_transformer_that_cannot_embed_is_one_line(corpus: Path, tmp_path: Path) -> None:
    path = sentence_transformer(tmp_path)
    change(path / "sentence_bert_config.json", max_seq_length="long")
    with pytest.raises(ModelError, match=r"cannot embed a text: TypeError: '>' not supported"):
        harvest(path, corpus, tmp_path / "out", unit="text")
    assert not list((tmp_path / "out").glob("*.json"))


def test_texts_are_pooled_without_a_pad_token(corpus: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    got = harvest(path := sentence_transformer(tmp_path, no_pad=True), corpus, tmp_path / "out", unit="text")
    model = SentenceTransformer(str(path), device="cpu")
    assert model.tokenizer.pad_token is None
    model.tokenizer.pad_token = "[PAD]"
    alone = np.stack([model.encode(text) for text in DOCS])
    assert row_errors(got.hook()[0 : len(got)], alone).max() < 1e-5


def test_modules_without_a_length_limit_are_pooled(corpus: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    build_model(tmp_path / "bert", "bert")
    tokenizer = Tokenizer.from_file(str(tmp_path / "bert" / "tokenizer.json"))
    weights = np.random.default_rng(0).normal(size=(tokenizer.get_vocab_size(), 16)).astype(np.float32)
    module = StaticEmbedding(tokenizer, embedding_weights=weights)
    SentenceTransformer(modules=[module], device="cpu").save(str(tmp_path / "static"))
    model = SentenceTransformer(str(tmp_path / "static"), device="cpu")
    assert model.max_seq_length == math.inf
    got = harvest(tmp_path / "static", corpus, tmp_path / "out", unit="text")
    assert row_errors(got.hook()[0 : len(got)], model.encode(DOCS)).max() < 1e-5


def without_tokenizer(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()


def only_special_tokens(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] = {word: i for word, i in content["model"]["vocab"].items() if i < 5}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def larger_vocabulary(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words |= {f"word{i}": len(words) + i for i in range(100)}
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_tokenizer, r"has no tokenizer files \(tokenizer.json, .*save the model's own tokenizer"),
        (only_special_tokens, r"has no words, only 5 special tokens"),
        (larger_vocabulary, r"has ids up to \d+, but the model's vocab_size is \d+: it belongs to another model"),
    ],
)
def test_a_tokenizer_that_is_not_the_models_is_refused(tmp_path: Path, corpus: Path, damage: Any, message: str) -> None:
    folder = build_model(tmp_path / "bert", "bert")
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load_tokenizer(locate(ModelConfig(str(folder))))
    command = f"run --model {folder} --layer 1 --dataset {corpus} --out {tmp_path / 'out'} --device cpu"
    refused(app, *command.split())
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_far_below_vocab_size_is_refused(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "bert", "bert")
    for size, foreign in ((128, False), (1000, True)):  # padded to a multiple of 128; of another model
        change(folder / "config.json", vocab_size=size)
        if foreign:
            with pytest.raises(ModelError, match=r"has \d+ tokens, but the model's vocab_size is 1,000"):
                load_tokenizer(locate(ModelConfig(str(folder))))
        else:
            load_tokenizer(locate(ModelConfig(str(folder))))


def test_unknown_tokens_are_warned_of_once_and_ids_without_a_row_refused(tmp_path: Path) -> None:
    located = locate(ModelConfig(str(build_model(tmp_path / "bert", "bert"))))
    tokenizer, said = load_tokenizer(located), []
    for ids, n_said in (([5] * 9 + [1], 0), ([5] * 4 + [1], 1)):
        tokenize = checked(lambda texts, ids=ids: [np.array(ids, np.int32)], tokenizer, located, said.append)
        for _ in range(20):
            tokenize(["text"])
        assert len(said) == n_said
    assert "tokens are unknown to the tokenizer ([UNK])" in said[0]
    with pytest.raises(ModelError, match=r"of id 99, but .* embeds only \d+ ids"):
        checked(lambda texts: [np.array([99], np.int32)], tokenizer, located, said.append)(["text"])


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """A Llama with a control token that its tokenizer marks as special and gives no role."""
    folder = build_model(tmp_path / "llama", "llama")
    content = json.loads((folder / "tokenizer.json").read_text())
    entry = next(token for token in content["added_tokens"] if token["content"] == "</s>")
    word = content["model"]["vocab"]["bread"]
    content["added_tokens"].append(entry | {"id": word, "content": "bread", "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_control_tokens_are_flagged_and_left_out(chat_model: Path, corpus: Path, tmp_path: Path) -> None:
    corpus.write_text("\n".join(texts(30, seed=5)))
    got = harvest(chat_model, corpus, tmp_path / "out", ctx_len=64)
    tokens, flags = got.column("token_id")[0 : len(got)], got.column("flags")[0 : len(got)]
    bread = got.vocabulary.index("bread")
    assert got.manifest.provenance["tokenizer"]["control_ids"] == [bread]
    assert 0 < (tokens == bread).sum() < len(got)
    assert np.array_equal((flags & FLAG_CONTROL) != 0, tokens == bread)
    assert ((flags & FLAG_SPECIAL) != 0)[tokens == bread].all()
    kept = Selection(Filters(), Holdout(0), "all").resolve(got)
    columns = {name: got.column(name)[0 : len(got)] for name in kept.columns}
    assert not kept.mask(columns)[tokens == bread].any()


def test_a_harvest_of_before_keeps_its_flags(
    chat_model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus.write_text("\n".join(texts(120, seed=5)))
    settings: dict[str, Any] = {"ctx_len": 64, "rows_per_shard": 256, "batch_tokens": 256}

    def before(*arguments: Any) -> dict[str, Any]:
        found = provenance(*arguments)
        del found["tokenizer"]["control_ids"]
        return found

    provenance = harvest_spec.provenance
    monkeypatch.setattr(harvest_prepare, "BATCHES_PER_BUFFER", 2)
    with monkeypatch.context() as patch, cut_off_after(10):
        patch.setattr(harvest_spec, "provenance", before)
        with pytest.raises(CutOff):
            harvest(chat_model, corpus, tmp_path / "out", **settings)
    assert list((tmp_path / "out" / "commits").iterdir())
    got = harvest(chat_model, corpus, tmp_path / "out", **settings)
    assert "control_ids" not in got.manifest.provenance["tokenizer"]
    assert not (got.column("flags")[0 : len(got)] & FLAG_CONTROL).any()


def counted(opened: Any, *tokens: int | str) -> int:
    counts = account(opened, Selection(Filters(exclude_tokens=tokens), Holdout(0)), ["layer_2"])
    assert counts.total == counts.train + counts.special + counts.excluded + counts.first_position
    return counts.excluded


def test_chosen_tokens_are_left_out(tmp_path: Path, corpus: Path) -> None:
    corpus.write_text("\n".join(texts(30, seed=5)))
    got = harvest(build_model(tmp_path / "gpt2", "gpt2"), corpus, tmp_path / "out")
    tokens = got.column("token_id")[0 : len(got)]
    fox, bread = got.vocabulary.index("\u0120fox"), got.vocabulary.index("\u0120bread")
    want = {i: int((tokens == i).sum()) for i in (fox, bread)}
    assert min(want.values()) > 0
    assert counted(got, " fox") == counted(got, fox) == counted(got, str(fox)) == counted(got, "\u0120fox") == want[fox]
    assert counted(got, " fox", bread, fox) == want[fox] + want[bread]
    for token, message in (
        (" foxx", r"^exclude_tokens: the cache's vocabulary of \d+ tokens has no ' foxx'; spell it .*did you mean"),
        (10**6, r"^exclude_tokens: id 1000000 is not among the \d+"),
        ("-1", r"has no '-1'"),
    ):
        with pytest.raises(SelectionError, match=message):
            counted(got, token)
    pooled = harvest(sentence_transformer(tmp_path), corpus, tmp_path / "pooled", unit="text")
    with pytest.raises(SelectionError, match="one row per text"):
        Filters(exclude_tokens=("fox",)).resolve(pooled)
