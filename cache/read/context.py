"""The text around a row, from the strings of its vocabulary; and ids of tokens that a person names by their strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from sae_granary.cache.errors import SelectionError
from sae_granary.cache.read.arrays import Column
from sae_granary.common.errors import nearest
from sae_granary.common.rows import FLAG_SPECIAL, DocumentRow


@dataclass(frozen=True)
class Context:
    """The tokens around a row in its document; for pooled rows the whole document, without tokens."""

    row: int
    rows: tuple[int, ...]  # ordinals of the tokens
    tokens: tuple[str | int, ...]  # strings, or ids where the cache has no vocabulary
    index: int  # of the row itself in `tokens`; -1 without tokens
    text: str  # the tokens as text, or the document's
    document: DocumentRow | None


def rows_around(doc_id: Column, flags: Column, row: int, before: int, after: int) -> list[int]:
    """The row and its neighbors in its own document; special tokens are left out, except for the row itself."""
    # Each window adds special tokens, so a wider slice than wanted is needed.
    low, high = max(0, row - 2 * before - 16), min(len(doc_id), row + 2 * after + 17)
    same = (doc_id[low:high] == doc_id[row]) & (flags[low:high] & FLAG_SPECIAL == 0)
    near = np.flatnonzero(same) + low
    return [*near[near < row][-before or len(near) :].tolist(), row, *near[near > row][:after].tolist()]


def join_tokens(tokens: Sequence[str | int]) -> str:
    """Tokens as readable text: WordPiece (##), SentencePiece (\u2581) and byte-level BPE (\u0120) conventions.

    For display only: offsets into the source text are not kept.
    """
    words = [str(token) for token in tokens]
    if not words:
        return ""
    if any(word.startswith("\u2581") for word in words):
        return "".join(words).replace("\u2581", " ").strip()
    if any(word[:1] in {"\u0120", "\u010a"} for word in words):
        return byte_level_text("".join(words)).strip()
    text = words[0].removeprefix("##")
    for word in words[1:]:
        text += word[2:] if word.startswith("##") else f" {word}"
    return text


def split_tokens(tokens: Sequence[str | int], index: int) -> tuple[str, str, str]:
    """The text before a token, its text and the text after it, spaces where the tokenizer has them.

    As `join_tokens`, but which convention holds is told from all tokens, and nothing is stripped.
    """
    words = [str(token) for token in tokens]
    parts = words[:index], [words[index]], words[index + 1 :]
    if any(word.startswith("\u2581") for word in words):
        before, token, after = ("".join(part).replace("\u2581", " ") for part in parts)
    elif any(word[:1] in {"\u0120", "\u010a"} for word in words):
        before, token, after = (byte_level_text("".join(part)) for part in parts)
    else:
        before, token, after = map(join_tokens, parts)
        before += " " if before and not words[index].startswith("##") else ""
        after = f" {after}" if after and not words[index + 1].startswith("##") else after
    return before, token, after


def byte_level_text(text: str) -> str:
    """The text of byte-level BPE (GPT-2) tokens; parts of characters as U+FFFD."""
    table = _byte_table()
    if any(character not in table for character in text):
        return text.replace("\u0120", " ").replace("\u010a", "\n")
    return bytes(table[character] for character in text).decode("utf-8", errors="replace")


def byte_level_form(text: str) -> str:
    """A text as byte-level BPE writes it: ` the` is `\u0120the`."""
    characters = {byte: character for character, byte in _byte_table().items()}
    return "".join(characters[byte] for byte in text.encode("utf-8", "surrogatepass"))


@lru_cache(maxsize=1)
def _byte_table() -> dict[str, int]:
    """The characters by which byte-level BPE (GPT-2) writes bytes: printable ones as themselves, others from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def token_ids(tokens: Sequence[int | str], words: Sequence[str] | None, cache: Path) -> tuple[int, ...]:
    """Ids of tokens, ascending. A whole number is an id; other strings are looked up in the cache's vocabulary.

    A string is spelled as in the vocabulary (`Ġthe`, `▁the`, `##ing`) or with a plain space in front (` the`).
    Raises SelectionError.
    """
    by_word: dict[str, int] = {} if words is None else {word: i for i, word in enumerate(words) if word}
    return tuple(sorted({i for token in tokens for i in _ids(cache, token, words, by_word)}))


def _ids(cache: Path, token: int | str, words: Sequence[str] | None, by_word: Mapping[str, int]) -> list[int]:
    if isinstance(token, int) or (token.isascii() and token.isdigit()):
        n_ids, those = (2**31, "ids that a token can have") if words is None else (len(words), "ids of the vocabulary")
        if not 0 <= int(token) < n_ids:
            raise SelectionError(f"exclude_tokens: id {token} is not among the {n_ids:,} {those}")
        return [int(token)]
    if words is None:
        raise SelectionError(f"exclude_tokens: {cache} stores no vocabulary to look {token!r} up: give token ids")
    spellings = {token, token.replace(" ", "\u2581"), byte_level_form(token)}
    found = [by_word[word] for word in spellings if word in by_word]
    if not found:
        raise SelectionError(
            f"exclude_tokens: the cache's vocabulary of {len(words):,} tokens has no {token!r}; "
            f"spell it as the tokenizer does, or give its id{nearest(token, by_word)}"
        )
    return found
