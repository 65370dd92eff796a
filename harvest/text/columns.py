"""The text of a record: detecting its column, and joining several columns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from sae_granary.common.errors import printable
from sae_granary.harvest.errors import SourceError
from sae_granary.harvest.text.document import (
    CHAT_NAMES,
    JOINED_NAMES,
    TEXT_NAMES,
    Record,
    Unfit,
    join_texts,
    skipped_counts,
    to_document,
)
from sae_granary.harvest.text.formats import again
from sae_granary.models.tokens.document import SKIP_REASONS, join_chat

SAMPLE_RECORDS = 100  # records that are looked at to find the columns and their kinds
MORE_RECORDS = 100_000  # ... where those tell nothing
_MAX_DEPTH = 4  # of columns in columns
Item = Mapping[str, Any] | Unfit  # one record of a table
Extract = Callable[[Item], object]


def find_columns(open_items: Callable[[], Iterator[Item]], wanted: Sequence[str], where: str) -> tuple[str, ...]:
    """Columns that hold the text in the first records. Raises SourceError.

    Reads SAMPLE_RECORDS records, and up to MORE_RECORDS if those identify no column or hold no text in it.
    """
    sample = list(islice(open_items(), SAMPLE_RECORDS))
    try:
        return _columns_of(lambda: iter(sample), wanted, where)
    except SourceError:
        if len(sample) < SAMPLE_RECORDS:
            raise
    return _columns_of(lambda: islice(open_items(), MORE_RECORDS), wanted, where)


def _columns_of(items: Callable[[], Iterator[Item]], wanted: Sequence[str], where: str) -> tuple[str, ...]:
    kinds = column_kinds(items())
    if not kinds:
        n_records = sum(1 for _ in items())
        raise SourceError(
            f"{where}: none of its first {n_records:,} records is a JSON object with columns, or a line with as many "
            "cells as the header"
        )
    columns = choose_columns(kinds, wanted, where)
    if twice := [name for name in columns if again(name) in kinds]:
        raise SourceError(f"{where} has two columns {twice[0]!r}: rename one of them")
    check_text(items(), columns, where)
    return columns


def column_kinds(records: Iterable[Item]) -> dict[str, str]:
    """Kind of each column over some records: "text", "texts", "chat", "other", or "none" if all were None.

    A column inside of a column is named `data.text`, and its kind begins with "inner".
    """
    kinds: dict[str, str] = {}
    for record in records:
        columns: Mapping[str, Any] = {} if isinstance(record, Unfit) else record
        for name, value in _flat(columns):
            if kinds.get(name, "none") in ("none", "inner none"):
                kinds[name] = _kind(value) if name in columns else f"inner {_kind(value)}"
    return kinds


def _flat(record: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        yield f"{before}{key}", value
        if isinstance(value, Mapping) and before.count(".") < _MAX_DEPTH:
            yield from _flat(value, f"{before}{key}.")


def value_of(record: Mapping[str, Any], name: str) -> Any:
    """A column, or a nested one (`data.text`); None if there is none."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def choose_columns(kinds: Mapping[str, str], wanted: Sequence[str], where: str) -> tuple[str, ...]:
    """The columns named by `--text-column`, else the ones that look like the text."""
    if missing := [name for name in wanted if name not in kinds]:
        raise SourceError(
            f"{where} has no column {missing[0]!r}; its columns are {listed(kinds)}: name one with --text-column"
        )
    if len(set(wanted)) < len(wanted):
        raise SourceError(f"--text-column {','.join(wanted)} names a column twice")
    if wanted:
        return tuple(wanted)
    by_lower = {name.strip().lower(): name for name in reversed(list(kinds))}
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
    for kind in ("text", "texts", "inner text", "inner texts", "inner chat"):
        found = [name for name in kinds if kinds[name] == kind]
        named = [name for name in found if name.rsplit(".", 1)[-1].lower() in TEXT_NAMES[:3] and kind != "text"]
        if len(one := named or found) == 1:
            return (one[0],)
        if found:
            break
    raise SourceError(
        f"{where} has no column that looks like its text; its columns are {listed(kinds)}: name one with --text-column"
    )


def extractor(columns: Sequence[str]) -> Extract:
    """record -> text, chat messages, None or Unfit; several columns are joined by newlines, empty ones left out."""
    seconds = [again(name) for name in columns]

    def joined(record: Item) -> object:
        if isinstance(record, Unfit):
            return record
        if any(name in record for name in seconds):
            return Unfit.MALFORMED
        if len(columns) == 1:
            return value_of(record, columns[0])
        values = [join_texts(value_of(record, name)) for name in columns]
        parts = [value for value in values if isinstance(value, str) and value]
        return "\n".join(parts) if parts else None

    return joined


def check_text(records: Iterable[Item], columns: Sequence[str], where: str) -> None:
    """Refuse columns without text in any of the first records."""
    extract = extractor(columns)
    counts, others = dict.fromkeys(SKIP_REASONS, 0), dict.fromkeys(columns, 0)
    for record in records:
        reason = to_document(0, Record(extract(record), "", 0), join_chat).skipped
        if reason is None:
            return
        counts[reason] += 1
        others |= dict.fromkeys(column_kinds([record]), 0)
    raise SourceError(
        f"{where} holds no text in {', '.join(columns)} in its first {sum(counts.values()):,} records "
        f"({skipped_counts(counts)}); its other columns are {listed(list(others)[len(columns) :])}: "
        "name one with --text-column"
    )


def _kind(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and not value:
        return "none"
    if isinstance(value, list) and all(isinstance(item, str | None) for item in value):
        return "texts"
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        keys = set(value[0])
        return "chat" if keys >= {"role", "content"} or keys >= {"from", "value"} else "other"
    return "other"


def listed(kinds: Collection[str]) -> str:
    """Column names in one line."""
    return ", ".join(map(printable, kinds)) if kinds else "none"
