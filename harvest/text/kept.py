"""`--keep-columns`: columns of the source's records that go into the cache beside the text.

A value is stored as the source gives it: text, a number, a bool or None. A column that a record lacks is None, and so
is a number that is not finite. Lists and objects are stored as the text of their JSON; what JSON lacks (a time as
`2024-05-01 12:30:00`, a decimal number, bytes) as text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from sae_granary.common.errors import nearest
from sae_granary.common.rows import Scalar
from sae_granary.harvest.errors import SourceError
from sae_granary.harvest.text.columns import MORE_RECORDS, SAMPLE_RECORDS, Item, column_kinds, listed, value_of
from sae_granary.harvest.text.document import Unfit
from sae_granary.harvest.text.formats import again
from sae_granary.models.tokens.document import replace_surrogates


def check_kept(open_items: Callable[[], Iterator[Item]], kept: Sequence[str], where: str) -> None:
    """Raise SourceError for a column to keep that no record has, or that there is twice.

    Looks at SAMPLE_RECORDS records, and at up to MORE_RECORDS where those lack one.
    """
    kinds: dict[str, str] = {}
    for n_records in (SAMPLE_RECORDS, MORE_RECORDS) if kept else ():
        kinds = column_kinds(islice(open_items(), n_records))
        if all(name in kinds for name in kept):
            break
    for name in kept:
        if name not in kinds:
            raise SourceError(
                f"{where} has no column {name!r} for --keep-columns{nearest(name, kinds)}; "
                f"its columns are {listed(kinds)}"
            )
        if again(name) in kinds:
            raise SourceError(f"{where} has two columns {name!r}, of --keep-columns: rename one of them")


def keep(item: Item, kept: Sequence[str]) -> dict[str, Scalar]:
    """The columns to keep of one record; a record that cannot be read has none."""
    if isinstance(item, Unfit):
        return {}
    return {name: scalar(value_of(item, name)) for name in kept}


def kept_identity(kept: Sequence[str]) -> Mapping[str, str]:
    """For the fingerprint: nothing where none are kept, as before there were any."""
    return {"kept_columns": ",".join(kept)} if kept else {}


def scalar(value: Any) -> Scalar:
    """A value as it is stored: what is no text, finite number, bool or None becomes text."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return replace_surrogates(value if isinstance(value, str) else _text(value))


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if not isinstance(value, list | dict):
        return str(value)
    try:
        return json.dumps(value, ensure_ascii=False, default=_text)
    except (ValueError, TypeError, RecursionError):  # an object in itself, or keys that are no text
        return str(value)
