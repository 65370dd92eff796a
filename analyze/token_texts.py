"""Tokens as they are shown one by one: with the space before them that the text has."""

from __future__ import annotations

from collections.abc import Sequence

from sae_granary.cache.read.context import byte_level_text


def displayed(tokens: Sequence[str], vocabulary: Sequence[str]) -> list[str]:
    """Tokens as pieces of text that join to a readable one: WordPiece, SentencePiece or byte-level BPE.

    The whole vocabulary says which convention it is. A byte-level token that is part of a character is shown as
    U+FFFD.

    >>> displayed(["the", "##re"], ["the", "##re"])
    [' the', 're']
    """
    if any(word.startswith("\u2581") for word in vocabulary):
        return [token.replace("\u2581", " ") for token in tokens]
    if any(word.startswith("\u0120") for word in vocabulary):
        return [byte_level_text(token) for token in tokens]
    return [token[2:] if token.startswith("##") and len(token) > 2 else f" {token}" for token in tokens]
