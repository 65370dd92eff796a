"""What the harvest tests share: tiny models of real architectures with real tokenizers, and a naive harvest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.pipeline import Pipeline
from sae_granary.harvest.settings.make import make_config

TEXT = (
    "the quick brown fox jumps over a lazy dog while rain falls on old stone walls and seven small birds sing "
    "about bread wine salt water fire earth wind light dark north south east west red green blue one two three"
)
WORDS = TEXT.split()
N_LAYERS = 3
WIDTH = 32

BERT_LIKE = ("bert", "distilbert", "modernbert")
ARCHITECTURES = (*BERT_LIKE, "gpt2", "llama", "qwen2", "qwen3", "t5")


class CutOff(Exception):
    """Stands for a crash."""


@contextmanager
def cut_off_after(n_batches: int) -> Iterator[None]:
    """Inside, the harvest raises CutOff at its n-th batch."""
    left = n_batches

    def cut(self: Pipeline, n_rows: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise CutOff
        tick(self, n_rows)

    tick = Pipeline._tick
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "_tick", cut)
        yield


def config_of(model: str | Path, text: Path, out: Path, **settings: object) -> HarvestConfig:
    """A harvest on a CPU: of layer 1, with a document per line, unless other `settings` are given."""
    given = {"model": str(model), "dataset": str(text), "documents": "line", "layers": 1, "device": "cpu", "out": out}
    return make_config(given | settings)


def packed(config: HarvestConfig, decoder: str | Path | None = None) -> HarvestConfig:
    """The same harvest by a decoder, of packed windows; a Llama is made beside the model unless one is given."""
    decoder = decoder or build_model(Path(config.model.model).parent / "decoder", "llama")
    model = replace(config.model, model=str(decoder))
    return replace(config, model=model, tokens=replace(config.tokens, pack=True))


def texts(n: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Ragged documents of known words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(1, longest))) for _ in range(n)]


def tiny_tokenizer(architecture: str) -> Any:
    """BERT-like: words with [CLS] and [SEP]; Llama: words with BOS; T5: words with EOS; GPT-2, Qwen: byte-level BPE."""
    if architecture in ("gpt2", "qwen2", "qwen3"):
        return _bpe_tokenizer("GPT2Tokenizer" if architecture == "gpt2" else "Qwen2Tokenizer")
    if architecture in BERT_LIKE:
        return _word_tokenizer(
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], "[CLS] $A [SEP]",
            cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]",
        )  # fmt: skip
    if architecture == "llama":
        return _word_tokenizer(
            ["<unk>", "<s>", "</s>"], "<s> $A", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )  # fmt: skip
    return _word_tokenizer(
        ["<pad>", "</s>", "<unk>"], "$A </s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def _word_tokenizer(special: list[str], template: str, **names: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=names["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    used = [(token, vocabulary[token]) for token in special if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **names)


def _bpe_tokenizer(name: str) -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator([TEXT], trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return getattr(transformers, name)(vocab=model["vocab"], merges=merges, model_max_length=128)


def tiny_config(architecture: str, vocab_size: int) -> Any:
    """A config of 3 layers, 32 wide."""
    import transformers as tf

    decoder = {
        "vocab_size": vocab_size, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
    }  # fmt: skip
    encoder = {
        "vocab_size": vocab_size, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4, "max_position_embeddings": 128,
    }  # fmt: skip
    configs: dict[str, Any] = {
        "bert": lambda: tf.BertConfig(**encoder),
        "distilbert": lambda: tf.DistilBertConfig(
            vocab_size=vocab_size, dim=WIDTH, hidden_dim=64, n_layers=N_LAYERS, n_heads=4, max_position_embeddings=128
        ),
        "modernbert": lambda: tf.ModernBertConfig(
            **encoder, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3, local_attention=8
        ),
        "gpt2": lambda: tf.GPT2Config(
            vocab_size=vocab_size, n_embd=WIDTH, n_layer=N_LAYERS, n_head=4, n_positions=128, bos_token_id=0,
            eos_token_id=0,
        ),
        "llama": lambda: tf.LlamaConfig(**decoder | {"bos_token_id": 1, "eos_token_id": 2}),
        "qwen2": lambda: tf.Qwen2Config(**decoder),
        "qwen3": lambda: tf.Qwen3Config(**decoder, head_dim=8),
        "t5": lambda: tf.T5Config(
            vocab_size=vocab_size, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=N_LAYERS, num_heads=4,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        ),
    }  # fmt: skip
    return configs[architecture]()


def build_model(folder: Path, architecture: str, seed: int = 0) -> Path:
    """A random-weight model with its tokenizer, saved as `from_pretrained` expects it."""
    import torch
    from transformers import AutoModel

    tokenizer = tiny_tokenizer(architecture)
    torch.manual_seed(seed)
    model = AutoModel.from_config(tiny_config(architecture, len(tokenizer)))
    with torch.no_grad():  # larger than the usual start, so that layers differ clearly
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class NaiveRow:
    """One token, computed the slow way."""

    doc_id: int
    window: int
    position: int
    doc_position: int
    token_id: int
    special: bool
    vector: np.ndarray


def naive_rows(folder: Path, docs: Sequence[str], layer: int, ctx_len: int) -> Iterator[NaiveRow]:
    """Each window through the whole model alone; `layer` from `output_hidden_states`, no hooks, no batches."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    bare, around = tokenizer("the", add_special_tokens=False)["input_ids"], tokenizer("the")["input_ids"]
    n_special, before = len(around) - len(bare), around.index(bare[0])
    window = 0
    for doc_id, text in enumerate(docs):
        content = tokenizer(text, add_special_tokens=False)["input_ids"]
        room = ctx_len - n_special
        for start in range(0, len(content), room):
            piece = content[start : start + room]
            ids = around[:before] + piece + around[before + len(bare) :]
            with torch.inference_mode():
                out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
            vectors = out.hidden_states[layer + 1][0].float().numpy()
            for position, (token, vector) in enumerate(zip(ids, vectors, strict=True)):
                inside = before <= position < before + len(piece)
                doc_position = start + position - before if inside else -1
                yield NaiveRow(doc_id, window, position, doc_position, token, not inside, vector)
            window += 1


def row_errors(found: Any, want: Any) -> np.ndarray:
    """Distance of each row relative to its length."""
    found, want = np.asarray(found).astype(np.float64), np.asarray(want).astype(np.float64)
    assert found.shape == want.shape
    return np.linalg.norm(found - want, axis=1) / np.linalg.norm(want, axis=1)
