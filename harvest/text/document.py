"""Sources of text, and which records can be harvested: records -> Document.

Ordinals count every record of the stream, including skipped ones, so that a row can be traced to its record and a
resumed harvest finds its position.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Protocol

from sae_granary.common.rows import Scalar
from sae_granary.harvest.config import TextConfig
from sae_granary.models.tokens.document import Document, Render, replace_surrogates, text_document

TEXT_NAMES = (
    "text", "content", "sentence", "document", "article", "body", "passage", "paragraph", "context", "review", "story",
    "abstract", "code", "query", "title",
)  # fmt: skip
CHAT_NAMES = ("messages", "conversations", "conversation", "chat")
JOINED_NAMES = (
    ("instruction", "input", "output"), ("instruction", "context", "response"), ("instruction", "response"),
    ("instruction", "output"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer"),
    ("sentence1", "sentence2"), ("premise", "hypothesis"),
)  # fmt: skip


class Unfit(Enum):
    """Placeholder for a record's value that cannot be read; the record is skipped and counted under this name."""

    NOT_JSON = "not_json"  # a line that is no JSON object where there should be one
    MALFORMED = "malformed"  # more cells than the table has columns, or the key of the text twice
    TOO_LARGE = "too_large"  # more than MAX_RECORD_BYTES


MAX_RECORD_BYTES = 256 << 20  # of one text, unpacked: memory for more is not to be had


@dataclass(frozen=True)
class Record:
    """One raw item of a source."""

    value: object  # a text, chat messages, or something that will be skipped
    source: str  # file or dataset it comes from
    row: int  # its place in that source; -1 if a shuffled stream does not tell
    repaired: bool = False  # bytes that are no UTF-8 were replaced
    n_bytes: float = 0.0  # its share of the source's `n_bytes`
    columns: Mapping[str, Scalar] = field(default_factory=dict)  # those that are kept


class TextSource(Protocol):
    """A stream of records that can be opened at any ordinal."""

    @property
    def name(self) -> str:
        """Its name for users."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the text; empty if there are none or they are not known yet."""

    @property
    def identity(self) -> Mapping[str, Scalar]:
        """What determines the stream: part of the fingerprint."""

    @property
    def seekable(self) -> bool:
        """Whether records from an ordinal on can be read without those before."""

    def records(self, start: int) -> Iterator[Record]:
        """Records from ordinal `start` on."""

    def n_bytes(self) -> int | None:
        """Size of the source in bytes, of which each record has a share; None if unknown before reading everything."""


def documents(source: TextSource, start: int, render: Render) -> Iterator[Document]:
    """Every record of the source as a Document, from ordinal `start` on."""
    for offset, record in enumerate(source.records(start)):
        yield to_document(start + offset, record, render)


def to_document(doc_id: int, record: Record, render: Render) -> Document:
    """A record as a document; empty, binary and invalid records are marked as skipped, never dropped."""
    value = join_texts(record.value)
    if isinstance(value, list):
        value = _render_chat(value, render)
    if value is None:
        return Document(doc_id, "", record.source, record.row, skipped="none")
    if isinstance(value, Unfit):
        return Document(doc_id, "", record.source, record.row, skipped=value.value)
    if not isinstance(value, str):
        return Document(doc_id, "", record.source, record.row, skipped="not_text")
    found = text_document(doc_id, value, record.source, record.row, repaired=record.repaired)
    return replace(found, columns=record.columns)


def join_texts(value: object) -> object:
    """A list of strings as one text, one per line; other values unchanged."""
    if isinstance(value, list) and value and all(isinstance(item, str | None) for item in value):
        return "\n".join(item for item in value if item)
    return value


def skipped_counts(counts: Mapping[str, int]) -> str:
    """`2 none, 1 not json`; empty if nothing was skipped."""
    return ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in counts.items() if n)


def _render_chat(value: list[Any], render: Render) -> str | None:
    messages = [message for item in value if (message := _message(item)) is not None]
    return render(messages) if messages else None


def _message(item: object) -> dict[str, str] | None:
    """A message `{"role", "content"}`, also from `{"from", "value"}` and from content in parts."""
    if not isinstance(item, dict):
        return None
    role = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    role = {"human": "user", "gpt": "assistant", "bot": "assistant"}.get(role, role)
    return {"role": role, "content": replace_surrogates(content)}


def shuffled(records: Iterable[Record], buffer_size: int, seed: int) -> Iterator[Record]:
    """Draw from a buffer that is refilled; depends only on the records, the buffer size and the seed."""
    if buffer_size < 2:
        yield from records
        return
    draw = random.Random(seed)
    buffer: list[Record] = []
    for record in records:
        if len(buffer) < buffer_size:
            buffer.append(record)
            continue
        index = draw.randrange(buffer_size)
        buffer[index], record = record, buffer[index]
        yield record
    draw.shuffle(buffer)
    yield from buffer


def shuffle_name(config: TextConfig) -> str:
    """The shuffling, for the fingerprint."""
    return f"buffer {config.shuffle_buffer}, seed {config.shuffle_seed}" if config.shuffle_buffer > 1 else "none"
