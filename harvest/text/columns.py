"""Which part of a record is the text: detection of the column, and joining of several."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from sae_granary.harvest.errors import SourceError
from sae_granary.harvest.text.document import (
    CHAT_NAMES,
    JOINED_NAMES,
    TEXT_NAMES,
    Record,
    Unfit,
    skipped_counts,
    to_document,
)
from sae_granary.models.tokens.document import SKIP_REASONS, join_chat

SAMPLE_RECORDS = 100  # records that are looked at to find the columns and their kinds
Item = Mapping[str, Any] | Unfit  # one record of a table
Extract = Callable[[Item], object]


def column_kinds(records: Iterable[Item]) -> dict[str, str]:
    """Kind of each column over some records: "text", "chat", "other", or "none" if all were None."""
    kinds: dict[str, str] = {}
    for record in records:
        for name, value in ({} if isinstance(record, Unfit) else record).items():
            if kinds.get(name, "none") == "none":
                kinds[name] = _kind(value)
    return kinds


def choose_columns(kinds: Mapping[str, str], wanted: Sequence[str], where: str) -> tuple[str, ...]:
    """The columns named by `--text-column`, else the ones that look like the text."""
    if missing := [name for name in wanted if name not in kinds]:
        raise SourceError(
            f"{where} has no column {missing[0]!r}; its columns are {_listed(kinds)}: name one with --text-column"
        )
    if wanted:
        return tuple(wanted)
    by_lower = {name.lower(): name for name in reversed(list(kinds))}
    for name in TEXT_NAMES[:3]:
        if kinds.get(by_lower.get(name, "")) in ("text", "none"):
            return (by_lower[name],)
    for name in CHAT_NAMES:
        if kinds.get(by_lower.get(name, "")) == "chat":
            return (by_lower[name],)
    for names in JOINED_NAMES:
        if all(kinds.get(by_lower.get(name, "")) == "text" for name in names):
            return tuple(by_lower[name] for name in names)
    for name in TEXT_NAMES[3:]:
        if kinds.get(by_lower.get(name, "")) == "text":
            return (by_lower[name],)
    text_columns = [name for name, kind in kinds.items() if kind == "text"]
    if len(text_columns) == 1:
        return (text_columns[0],)
    raise SourceError(
        f"{where} has no column that looks like its text; its columns are {_listed(kinds)}: name one with --text-column"
    )


def extractor(columns: Sequence[str]) -> Extract:
    """record -> text, chat messages, None or Unfit; several columns are joined by newlines, empty ones left out."""
    if len(columns) == 1:
        column = columns[0]
        return lambda record: record if isinstance(record, Unfit) else record.get(column)

    def joined(record: Item) -> object:
        if isinstance(record, Unfit):
            return record
        parts = [value for name in columns if isinstance(value := record.get(name), str) and value]
        return "\n".join(parts) if parts else None

    return joined


def check_text(records: Sequence[Item], columns: Sequence[str], where: str) -> None:
    """Refuse columns that hold no text in any of the first records."""
    extract = extractor(columns)
    reasons = [to_document(0, Record(extract(record), "", 0), join_chat).skipped for record in records]
    if None in reasons:
        return
    counts = skipped_counts({reason: reasons.count(reason) for reason in SKIP_REASONS})
    others = [name for name in column_kinds(records) if name not in columns]
    raise SourceError(
        f"{where} holds no text in {', '.join(columns)} in its first {len(records):,} records ({counts}); "
        f"its other columns are {_listed(others)}: name one with --text-column"
    )


def _kind(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        keys = set(value[0])
        return "chat" if keys >= {"role", "content"} or keys >= {"from", "value"} else "other"
    return "other"


def _listed(kinds: Collection[str]) -> str:
    return ", ".join(kinds) if kinds else "none"
