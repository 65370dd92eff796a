"""Tiny language models that are trained for a second on the demo text, and caches harvested from them.

A model with random weights would show nothing: its predictions hardly depend on what an SAE loses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from command_kit import invoke

CTX_LEN = 64
VOCABULARY = 256
MASKED = ("bert", "modernbert")  # of these only modernbert learns anything within seconds
FLAGS = ["--layer", "0", "--device", "cpu", "--dtype", "float32", "--ctx-len", str(CTX_LEN), "--max-tokens", "12k"]


def demo_texts() -> list[str]:
    from pydoc_data.topics import topics

    return [" ".join(topics[name].split())[:400] for name in sorted(topics)]


def trained_model(folder: Path, kind: str, n_steps: int = 150) -> Path:
    """A 2-layer model, 64 wide, with its head: gpt2 or llama (next token), bert or modernbert (masked token)."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(kind)
    model = _model(kind, len(tokenizer))
    texts = tokenizer(demo_texts(), add_special_tokens=False)["input_ids"]
    ids = torch.tensor([token for text in texts for token in text])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(n_steps):
        starts = torch.randint(len(ids) - CTX_LEN, (16,), generator=generator)
        batch = torch.stack([ids[start : start + CTX_LEN] for start in starts])
        labels = batch.clone()
        if kind in MASKED:
            masked = torch.rand(batch.shape, generator=generator) < 0.3
            labels[~masked] = -100
            batch[masked] = tokenizer.mask_token_id
        optimizer.zero_grad()
        model(input_ids=batch, labels=labels).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def harvest(model: Path, out: Path, *flags: str) -> Path:
    """A cache of layer 0, by the command."""
    from sae_granary.harvest.cli import app

    data = out.parent / "texts.jsonl"
    if not data.exists():
        import json

        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in demo_texts()), encoding="utf-8")
    invoke(app, "run", "--model", model, "--dataset", data, "--out", out, *FLAGS, *flags)
    return out


def _tokenizer(kind: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"] if kind in MASKED else ["<s>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted({chr(byte) for byte in range(32, 127)} | {"\u0120"})
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(demo_texts(), trainer)
    around = "[CLS] $A [SEP]" if kind in MASKED else "<s> $A"
    used = [(token, bpe.token_to_id(token)) for token in special if token in around]
    bpe.post_processor = processors.TemplateProcessing(single=around, special_tokens=used)
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, model_max_length=CTX_LEN, **(names if kind in MASKED else {"bos_token": "<s>"})
    )


def _model(kind: str, vocab_size: int) -> Any:
    import transformers as tf

    sizes = {"vocab_size": vocab_size, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": CTX_LEN}
    if kind == "bert":
        return tf.BertForMaskedLM(tf.BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    if kind == "modernbert":
        ids = {"pad_token_id": 0, "cls_token_id": 1, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2}
        return tf.ModernBertForMaskedLM(tf.ModernBertConfig(**sizes, **ids, local_attention=8, initializer_range=0.1))
    if kind == "llama":
        return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, bos_token_id=0, eos_token_id=None))
    config = tf.GPT2Config(
        vocab_size=vocab_size, n_embd=64, n_layer=2, n_head=4, n_positions=CTX_LEN, bos_token_id=0, eos_token_id=None,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return tf.GPT2LMHeadModel(config)
