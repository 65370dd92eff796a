"""A text as a model is given it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Render = Callable[[list[dict[str, str]]], str]  # chat messages -> one text
SKIP_REASONS = ("none", "empty", "binary", "not_text", "no_tokens", "not_json", "malformed", "too_large")


@dataclass(frozen=True)
class Document:
    """A text with its ordinal in the stream; `skipped` names the reason when there is none to harvest."""

    doc_id: int
    text: str
    source: str
    row: int
    skipped: str | None = None
    repaired: bool = False


def join_chat(messages: list[dict[str, str]]) -> str:
    """Chat messages of a model without a chat template: `role: content`, a blank line between."""
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
