"""Texts that are tokenized in pieces have the tokens of the whole text."""

from itertools import pairwise
from typing import Any

import pytest
from harvest_kit import WORDS, texts, tiny_tokenizer

from sae_granary.models.tokens import long_texts
from sae_granary.models.tokens.long_texts import cuts_of, encode

TEXTS = {
    "words": " ".join(texts(60)),
    "lines": "\n\n".join(texts(120, longest=6)),
    "code": "\n".join("    " * (i % 4) + line for i, line in enumerate(texts(80, longest=6))),
    "tabs": "\t".join(texts(60)),
    "no space": "".join(texts(300, longest=2)),
    "not ASCII": " ".join(f"ß日本{word}🦊" for word in texts(200, longest=4)),
}


def sentencepiece(space: str) -> Any:
    """As of Llama 2 (`prepend`: before whatever it is given) and of T5, XLM-R, ... (`always`)."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({*WORDS, *(f"▁{word}" for word in WORDS), *"▁\n\tßabcdefghijklmnopqrstuvwxyz", "日本", "▁▁"})
    pieces = [("<unk>", -9.0), *((word, -1.0 - i % 50) for i, word in enumerate(words))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    if space == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=space)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("name", ["prepend", "always", "first", "bert", "gpt2", "t5"])
def test_pieces_have_the_tokens_of_the_whole_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer(name) if name in ("bert", "gpt2", "t5") else sentencepiece(name)
    want = [encode(tokenizer, [text])[0].tolist() for text in TEXTS.values()]
    assert want == [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in TEXTS.values()]
    monkeypatch.setattr(long_texts, "PIECE_CHARS", 500)
    monkeypatch.setattr(long_texts, "_OVER", 100)
    assert min(len(cuts_of(text)) for text in TEXTS.values()) >= 2
    found = encode(tokenizer, ["the fox", *TEXTS.values(), ""])
    assert [ids.tolist() for ids in found[1:-1]] == want
    assert (len(found[0]), len(found[-1])) == (len(encode(tokenizer, ["the fox"])[0]), 0)


def test_cuts_are_before_whitespace_and_not_far_apart() -> None:
    text = " ".join(texts(1, longest=50)[0] for _ in range(12_000))
    cuts = [0, *cuts_of(text), len(text)]
    assert all(text[cut] == " " for cut in cuts[1:-1])
    assert max(b - a for a, b in pairwise(cuts)) <= long_texts.PIECE_CHARS
    assert cuts_of("x" * (long_texts.PIECE_CHARS + 5)) == [long_texts.PIECE_CHARS]


def test_a_tokenizer_that_does_not_tell_places_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "PIECE_CHARS", 100)

    def words(batch: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[len(word) for word in text.split()] for text in batch]}

    text = TEXTS["words"]
    assert encode(words, [text])[0].tolist() == [len(word) for word in text.split()]
