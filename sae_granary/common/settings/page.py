"""The rows of the parameters page (docs/parameters.md), from the declared fields."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import Field
from typing import Any

from sae_granary.common.quantities import COUNT_WORDS
from sae_granary.common.settings.coerce import describe
from sae_granary.common.settings.declare import choices_of, declared, default_of, kinds_of
from sae_granary.common.settings.flags import default_words, names_of, plain, range_of

Row = tuple[str, str, str, str, str, str]
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
HEAD: Row = ("name", "flag", "type", "default", "range", "meaning")


def row_of(spec: Field[Any], kind: Any) -> Row:
    """Return name, flag, type, default, range and meaning of a declared field."""
    choices, unit = choices_of(spec, kind), spec.metadata["unit"]
    type_words = ("one of " + ", ".join(choices) if choices else describe(kind)).replace(COUNT_WORDS, "whole number")
    type_words = type_words.replace("a number", "number")
    if unit:
        first, _, rest = type_words.partition(" or ")
        type_words = f"{first} of {unit}" + (f" or {rest}" if rest else "")
    default = default_of(spec)
    shown = default_words(spec) or (plain(default) if default is None or default is False else "")
    flag = f"`{names_of(spec, kind)[0].split('/')[0]}`"
    return f"`{spec.name}`", flag, type_words, shown, range_of(spec, _SIGNS), str(spec.metadata["help"])


def rows_of(config: type[Any], section: str = "") -> list[Row]:
    """Return the rows of the declared fields of a config, of one section or of all."""
    kinds = kinds_of(config)
    return [
        row_of(spec, kinds[name])
        for name, spec in declared(config).items()
        if section in ("", spec.metadata["section"])
    ]


def table(rows: Iterable[Row]) -> str:
    """Return a Markdown table, without the columns that are empty in every row."""
    cells = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    used = [i for i in range(len(HEAD)) if i in (0, 5) or any(row[i] for row in cells)]
    lines = [HEAD, tuple("---" for _ in HEAD), *cells]
    return "\n".join("| " + " | ".join(line[i] for i in used) + " |" for line in lines) + "\n"
