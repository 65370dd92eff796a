"""The forward stage: memory that runs out, activations that are no numbers, hooks and tokenizers by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harvest_kit import build_model, config_of, tiny_tokenizer
from torch import nn

from sae_granary.cache.errors import BadActivationError
from sae_granary.harvest.run import harvest_activations
from sae_granary.models import blocks
from sae_granary.models.blocks import choose_hooks, find_blocks, hook_names
from sae_granary.models.config import TokenConfig, WhereConfig
from sae_granary.models.errors import HookError, MemoryLimitError
from sae_granary.models.forward import TokenModel
from sae_granary.models.hooks import Hook, probe
from sae_granary.models.tokens.contexts import StreamState, WindowRules
from sae_granary.models.tokens.document import Document
from sae_granary.models.tokens.stream import WindowStream, buffers
from sae_granary.models.tokens.tokenizer import (
    chat_renderer,
    special_tokens_around,
    text_tokenizer,
    tokenizer_hash,
    window_rules,
)


class Blocks(nn.Module):
    """Embeds a token as its number; block i adds i + 1, in place, which a late copy would see."""

    def __init__(self, n: int = 3, memory: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(torch.arange(300.0)[:, None].repeat(1, 2))
        self.layers = nn.ModuleList([nn.Identity() for _ in range(n)])
        self.memory = memory

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        if self.memory is not None and input_ids.numel() > self.memory:
            raise torch.OutOfMemoryError("stub")
        x = self.embed(input_ids)
        for i, layer in enumerate(self.layers):
            x = layer(x.add_(i + 1))
        return x


def a_buffer(lengths: list[int]) -> Any:
    docs = [Document(i, "x" * n, "test", i) for i, n in enumerate(lengths)]
    tokens = [(document, np.arange(len(document.text), dtype=np.int32) + 10 * document.doc_id) for document in docs]
    (buffer,) = buffers(WindowStream(tokens, WindowRules(64), StreamState()), 10**6)
    return buffer


HOOKS = [Hook("layer_0", "layers.0", d_in=2), Hook("layer_1", "layers.1", d_in=2)]
LENGTHS = [3, 9, 1, 7, 7, 2, 12]


def run_model(model: TokenModel, buffer: Any) -> dict[str, torch.Tensor]:
    return model(model.prepare(buffer), lambda n_rows: None)


def test_rows_come_back_in_source_order_and_before_later_in_place_work() -> None:
    buffer = a_buffer(LENGTHS)
    model = TokenModel(Blocks(), HOOKS, "cpu", batch_tokens=16, pad_id=0, say=print)
    out = run_model(model, buffer)
    ids = torch.from_numpy(np.concatenate([window.ids for window in buffer.windows])).float()
    assert torch.equal(out["layer_0"][:, 0], ids + 1)
    assert torch.equal(out["layer_1"][:, 0], ids + 3)


def test_batches_are_halved_when_memory_runs_out() -> None:
    said: list[str] = []
    buffer = a_buffer([12, 12, 11, 12, 5, 5, 3])
    model = TokenModel(Blocks(memory=14), HOOKS, "cpu", batch_tokens=64, pad_id=0, say=said.append)
    whole = TokenModel(Blocks(), HOOKS, "cpu", batch_tokens=64, pad_id=0, say=said.append)
    out, want = run_model(model, buffer), run_model(whole, buffer)
    assert all(torch.equal(out[name], want[name]) for name in want)
    assert said[0] == "out of memory with a batch of 48 tokens: going on with 24"
    n_said = len(said)
    run_model(model, buffer)
    assert len(said) == n_said  # the smaller size is kept
    with pytest.raises(MemoryLimitError, match="one window of 12 tokens does not fit"):
        run_model(TokenModel(Blocks(memory=8), HOOKS, "cpu", batch_tokens=64, pad_id=0, say=said.append), buffer)


@pytest.mark.parametrize(("dtype", "value"), [("float32", "nan"), ("float16", "70000")])
def test_values_that_cannot_be_stored_name_document_and_hook(tmp_path: Path, dtype: str, value: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = build_model(tmp_path / "model", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["embed_tokens.weight"][7] = float(value)  # a word that the second document has
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    word = list(tiny_tokenizer("llama").get_vocab())
    bad = next(w for w in word if tiny_tokenizer("llama").get_vocab()[w] == 7)
    good = next(w for w in word if tiny_tokenizer("llama").get_vocab()[w] == 9)
    (tmp_path / "text.txt").write_text(f"{good} {good}\n{good} {bad}\n")
    config = config_of(folder, tmp_path / "text.txt", tmp_path / "out", layers=0, dtype=dtype)
    with pytest.raises(BadActivationError, match=r"hook point 'layer_0', document 1, row \d: value"):
        harvest_activations(config, quiet=True)
    assert not (tmp_path / "out").exists()


def test_blocks_are_the_list_that_the_config_counts() -> None:
    model = nn.Module()
    model.experts = nn.ModuleList([nn.Linear(1, 1) for _ in range(8)])
    model.layers = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(1, 1)] * 9)}) for _ in range(4)])
    assert find_blocks(model, 4).path == "layers"
    assert find_blocks(model, None).path == "experts"
    with pytest.raises(HookError, match="has no list of blocks"):
        find_blocks(nn.Linear(1, 1), 3)


def test_globs_stay_inside_one_part_of_the_path() -> None:
    model = Blocks()
    assert hook_names(model) == ["embed", "layers", "layers.0", "layers.1", "layers.2"]
    where = WhereConfig(hooks=("layers.*", "**.1:in"))
    assert [hook.name for hook in choose_hooks(model, 3, where)] == ["layers.0", "layers.1", "layers.1.in", "layers.2"]
    assert [hook.name for hook in choose_hooks(model, 3, WhereConfig(layers="all", layer_stride=2))] == [
        "layer_0",
        "layer_2",
    ]
    assert [hook.d_in for hook in probe(model, [Hook("e", "layers.1", "input")], "cpu")] == [2]


def test_shared_blocks_are_hooked_at_their_first_use_only() -> None:
    shared = blocks.Blocks("layers", 1, shared=True)
    assert blocks.choose_layers(shared, WhereConfig(layers=(0,))) == [0]
    with pytest.raises(HookError, match=r"applies the 1 block\(s\) of layers several times; only --layer 0"):
        blocks.choose_layers(shared, WhereConfig(layers=(5,)))


def test_special_tokens_bos_and_separator() -> None:
    bert, llama, gpt2 = tiny_tokenizer("bert"), tiny_tokenizer("llama"), tiny_tokenizer("gpt2")
    assert special_tokens_around(bert) == ((2,), (3,))
    assert special_tokens_around(llama) == ((1,), ())

    def rules(tokenizer: Any, **options: Any) -> WindowRules:
        return window_rules(tokenizer, TokenConfig(**options), is_decoder=True, max_positions=64, default_len=512)

    assert (rules(llama).prefix, rules(llama).ctx_len) == ((1,), 64)
    assert rules(llama, bos=False).prefix == ()
    assert gpt2.bos_token_id == 0  # as that of GPT-NeoX, and no absent one (SAELens#724)
    assert 0 in rules(gpt2).special_ids
    assert [rules(gpt2, bos=bos).prefix for bos in (None, True, False)] == [(), (0,), ()]
    assert rules(llama, pack=True).separator == llama.eos_token_id
    assert bert.unk_token_id not in rules(bert).special_ids
    assert bert.cls_token_id in rules(bert).special_ids


def test_a_chat_template_is_used_and_its_bos_not_doubled() -> None:
    tokenizer = tiny_tokenizer("llama")
    messages = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "jumps"}]
    assert chat_renderer(tokenizer)(messages) == "user: the fox\n\nassistant: jumps"
    tokenizer.chat_template = "{{ bos_token }} {% for m in messages %}{{ m.content }} {% endfor %}"
    assert chat_renderer(tokenizer)(messages).split() == ["the", "fox", "jumps"]
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    assert chat_renderer(tokenizer)(messages).startswith("user: ")


def test_the_tokenizer_hash_is_of_what_it_does() -> None:
    first, other = tiny_tokenizer("bert"), tiny_tokenizer("llama")
    before = tokenizer_hash(first)
    first(["the fox", "a"], padding=True, truncation=True, max_length=3)  # leaves its settings behind
    assert tokenizer_hash(first) == before == tokenizer_hash(tiny_tokenizer("bert"))
    assert tokenizer_hash(other) != before


class WordLengths:
    """A slow tokenizer, which processes can import."""

    is_fast = False

    def __call__(self, batch: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[len(word) for word in text.split()] for text in batch]}


def test_slow_tokenizers_run_in_processes() -> None:
    tokenize = text_tokenizer(WordLengths(), WordLengths, num_proc=2)
    assert [ids.tolist() for ids in tokenize(["a bb", "ccc", ""])] == [[1, 2], [3], []]
