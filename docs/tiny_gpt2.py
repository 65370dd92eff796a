"""Write a small GPT-2 that knows a little English, for pages that are tested without a network.

    python docs/tiny_gpt2.py gpt2    # then `--model gpt2` means this folder

6 blocks, 64 wide, a vocabulary of 512 byte pairs, 64 tokens of context; trained for 300 steps on Python's help texts
(half a minute on 2 CPU cores). Its predictions depend on its activations, which is what the pages need to show.
"""

from __future__ import annotations

import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CONTEXT, VOCABULARY, STEPS, BATCH = 64, 512, 300, 16


def texts() -> list[str]:
    """The help texts, each on one line."""
    return [" ".join(topics[name].split()) for name in sorted(topics)]


def make_tokenizer() -> Any:
    """A byte-level BPE as GPT-2 has, trained on the texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts(), trainer)
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=CONTEXT, **ends)


def make_model(tokenizer: Any) -> Any:
    """Trained for STEPS steps; the loss falls from 6.9 to about 2.9 nats."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=64, n_layer=6, n_head=4, bos_token_id=0, eos_token_id=0,
        initializer_range=0.08, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.tensor([token for text in texts() for token in tokenizer(text)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, STEPS)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        starts = torch.randint(len(ids) - CONTEXT, (BATCH,), generator=generator)
        batch = torch.stack([ids[start : start + CONTEXT] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}/{STEPS}: loss {float(loss.detach()):.2f}", flush=True)
    return model.eval()


def main(folder: Path) -> None:
    """Write model and tokenizer."""
    transformers.utils.logging.set_verbosity_error()
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "gpt2"))
