"""A text as the model receives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sae_granary.common.rows import Scalar

Render = Callable[[list[dict[str, str]]], str]  # chat messages -> one text
_CONTROL_SHARE = 0.1  # more control characters than this share of the first characters: not text
_LOOK = 4096  # characters that are looked at
SKIP_REASONS = ("none", "empty", "binary", "not_text", "no_tokens", "not_json", "malformed", "too_large")


@dataclass(frozen=True)
class Document:
    """A text with its ordinal in the stream; `skipped` gives the reason if it is not harvested."""

    doc_id: int
    text: str
    source: str
    row: int
    skipped: str | None = None
    repaired: bool = False
    columns: Mapping[str, Scalar] = field(default_factory=dict)  # of its record, kept beside the text


def join_chat(messages: list[dict[str, str]]) -> str:
    """Chat messages of a model without a chat template: `role: content`, a blank line between."""
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def text_document(doc_id: int, text: str, source: str, row: int, *, repaired: bool = False) -> Document:
    """Turn a text into a document: empty and binary texts are skipped, lone surrogates replaced."""
    if not text.strip():
        return Document(doc_id, "", source, row, skipped="empty")
    if is_binary(text):
        return Document(doc_id, "", source, row, skipped="binary")
    plain = replace_surrogates(text)
    return Document(doc_id, plain, source, row, repaired=repaired or plain is not text)


def replace_surrogates(text: str) -> str:
    """Lone surrogates (no Unicode text, and no tokenizer takes them) become U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def is_binary(text: str) -> bool:
    """Whether a text has a NUL, or many control characters near its beginning."""
    head = text[:_LOOK]
    control = sum(1 for char in head if char < " " and char not in "\t\n\r\f\v\b\x1b")
    return "\0" in text or control > _CONTROL_SHARE * len(head)
