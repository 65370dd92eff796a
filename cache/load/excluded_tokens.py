"""Tokens named by a person, ids or strings, as ids of a cache's vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sae_granary.cache.errors import SelectionError
from sae_granary.cache.read.context import byte_level_form
from sae_granary.common.errors import nearest

if TYPE_CHECKING:
    from sae_granary.cache.read.reader import Cache


def token_ids(cache: Cache, tokens: Sequence[int | str]) -> tuple[int, ...]:
    """Ids of tokens, ascending. A whole number is an id; other strings are looked up in the cache's vocabulary.

    A string is spelled as in the vocabulary (`Ġthe`, `▁the`, `##ing`) or with a plain space in front (` the`).
    Raises SelectionError.
    """
    if cache.unit != "token":
        raise SelectionError(f"{cache.path} holds one row per text, not per token: leave out exclude_tokens")
    words = cache.vocabulary
    by_word: dict[str, int] = {} if words is None else {word: i for i, word in enumerate(words) if word}
    return tuple(sorted({i for token in tokens for i in _ids(cache, token, words, by_word)}))


def _ids(cache: Cache, token: int | str, words: Sequence[str] | None, by_word: Mapping[str, int]) -> list[int]:
    if isinstance(token, int) or (token.isascii() and token.isdigit()):
        n_ids, those = (2**31, "ids that a token can have") if words is None else (len(words), "ids of the vocabulary")
        if not 0 <= int(token) < n_ids:
            raise SelectionError(f"exclude_tokens: id {token} is not among the {n_ids:,} {those}")
        return [int(token)]
    if words is None:
        raise SelectionError(f"exclude_tokens: {cache.path} stores no vocabulary to look {token!r} up: give token ids")
    spellings = {token, token.replace(" ", "\u2581"), byte_level_form(token)}
    found = [by_word[word] for word in spellings if word in by_word]
    if not found:
        raise SelectionError(
            f"exclude_tokens: the cache's vocabulary of {len(words):,} tokens has no {token!r}; "
            f"spell it as the tokenizer does, or give its id{nearest(token, by_word)}"
        )
    return found
