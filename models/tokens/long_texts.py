"""Texts of many characters -> token ids, in pieces, equal to those of the whole text.

Some tokenizers take quadratic time (transformers#25873), so long texts are cut. Each piece reaches over the cuts, and
two neighbors are joined where both begin the same tokens at the same characters: many tokenizers put a space in front
of whatever they are given (transformers#28218), and not all languages have spaces to cut at.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from sae_granary.models.tokens.contexts import IntArray

PIECE_CHARS = 1 << 20
_OVER = 2000  # characters of a piece on the other side of a cut
_AGREE = 4  # tokens that must be the same on both sides of a joint
# Nothing but ids; `verbose` would warn of texts longer than the model takes: windows are cut afterwards.
PLAIN = dict.fromkeys(("padding", "truncation", "return_attention_mask", "return_token_type_ids", "verbose"), False)


class _Tokens(NamedTuple):
    """Ids with the character of the whole text where each begins."""

    ids: IntArray
    starts: IntArray


def encode(tokenizer: Any, texts: Sequence[str]) -> list[IntArray]:
    """Token ids without special tokens, whole texts, nothing truncated."""
    short = [text for text in texts if len(text) <= PIECE_CHARS]
    ids = tokenizer(short, add_special_tokens=False, **PLAIN)["input_ids"] if short else ()
    found = iter(np.asarray(item, np.int32) for item in ids)
    return [next(found) if len(text) <= PIECE_CHARS else _encode_long(tokenizer, text) for text in texts]


def _encode_long(tokenizer: Any, text: str) -> IntArray:
    cuts = [0, *cuts_of(text), len(text)]
    if not getattr(tokenizer, "is_fast", False):  # it does not tell where its tokens begin
        pieces = [text[a:b] for a, b in pairwise(cuts)]
        parts = tokenizer(pieces, add_special_tokens=False, **PLAIN)["input_ids"]
        return np.concatenate([np.asarray(part, np.int32) for part in parts])
    ids = np.empty(0, np.int32)
    left = _tokens(tokenizer, text, 0, cuts[1] + _OVER)
    for cut, end in pairwise(cuts[1:]):
        right = _tokens(tokenizer, text, cut - _OVER, end + _OVER)
        last, first = _joint(left, right, cut)
        ids = np.append(ids, left.ids[:last])
        left = _Tokens(right.ids[first:], right.starts[first:])
    return np.append(ids, left.ids).astype(np.int32)


def cuts_of(text: str) -> list[int]:
    """Where a text is cut: at most PIECE_CHARS apart, before whitespace where there is any."""
    cuts, start = [], 0
    while len(text) - start > PIECE_CHARS:
        low, high = start + PIECE_CHARS // 2, start + PIECE_CHARS
        cut = max(text.rfind(" ", low, high), text.rfind("\n", low, high))
        start = cut if cut > 0 else high
        cuts.append(start)
    return cuts


def _tokens(tokenizer: Any, text: str, start: int, end: int) -> _Tokens:
    found = tokenizer(text[start:end], add_special_tokens=False, return_offsets_mapping=True, **PLAIN)
    offsets = np.asarray(found["offset_mapping"], np.int64).reshape(-1, 2)
    return _Tokens(np.asarray(found["input_ids"], np.int32), (offsets[:, 0] + start).astype(np.int32))


def _joint(left: _Tokens, right: _Tokens, cut: int) -> tuple[int, int]:
    """(tokens of the left piece, first token of the right one): where they agree, nearest to the cut, else at it."""
    place = {int(start): j for j, start in reversed(list(enumerate(right.starts[: 4 * _OVER]))) if start < cut + _OVER}
    best = None
    for i in range(int(np.searchsorted(left.starts, cut - _OVER)), len(left.ids) - _AGREE):
        j = place.get(int(left.starts[i]), 0)
        if i < _AGREE or j < _AGREE or left.starts[i - 1] == left.starts[i]:
            continue
        near, far = slice(i - _AGREE, i + _AGREE), slice(j - _AGREE, j + _AGREE)
        same = np.array_equal(left.ids[near], right.ids[far]) and np.array_equal(left.starts[near], right.starts[far])
        if same and (best is None or abs(left.starts[i] - cut) < abs(left.starts[best[0]] - cut)):
            best = i, j
    if best is None:
        best = int(np.searchsorted(left.starts, cut)), int(np.searchsorted(right.starts, cut))
    return best
