"""Text from standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import chain, islice
from typing import IO

from sae_granary.common.rows import Scalar
from sae_granary.harvest.config import TextConfig
from sae_granary.harvest.errors import SourceError
from sae_granary.harvest.text.columns import Extract, Item, choose_columns, column_kinds, extractor
from sae_granary.harvest.text.document import Record, Unfit, shuffle_name, shuffled
from sae_granary.harvest.text.formats import json_object, text_records
from sae_granary.harvest.text.kept import check_kept, keep, kept_identity


class StdinSource:
    """One document per line of standard input (or per paragraph, or all of it); JSON lines when the first is JSON."""

    name = "-"
    seekable = False
    columns: tuple[str, ...] = ()

    def __init__(self, config: TextConfig, stream: IO[bytes] | None = None) -> None:
        self._config = config
        self._mode = "line" if config.documents == "auto" else config.documents
        self._texts = text_records(stream if stream is not None else sys.stdin.buffer, "stdin", self._mode)
        if config.text_columns or config.keep_columns:  # looked for in the first line, before a model is loaded
            _ = self._extract

    @property
    def identity(self) -> Mapping[str, Scalar]:
        """A pipe cannot be looked at twice: that the same text comes again is the caller's promise."""
        return {
            "dataset": "standard input",
            "text_columns": ",".join(self._config.text_columns),
            **kept_identity(self._config.keep_columns),
            "documents": self._config.documents,
            "shuffle": shuffle_name(self._config),
        }

    def records(self, start: int) -> Iterator[Record]:
        """The documents of the stream from ordinal `start` on."""
        stream = shuffled(self._all(), self._config.shuffle_buffer, self._config.shuffle_seed)
        return islice(stream, start, None)

    def n_bytes(self) -> int | None:
        """Not known."""
        return None

    def _all(self) -> Iterator[Record]:
        extract, kept = self._extract, self._config.keep_columns
        for record in self._texts:
            if extract is None or not isinstance(record.value, str):
                yield record
            else:
                found = json_object(record.value)
                item: Item = Unfit.NOT_JSON if found is None else found
                yield replace(record, value=extract(item), columns=keep(item, kept))

    @cached_property
    def _extract(self) -> Extract | None:
        """How a line gives its text: None where the first is no JSON object. Raises SourceError."""
        first = next(self._texts, None)
        if first is None:
            return None
        self._texts = chain([first], self._texts)
        kept, wanted = self._config.keep_columns, self._config.text_columns
        head = json_object(first.value) if self._mode == "line" and isinstance(first.value, str) else None
        if head is not None:
            check_kept(lambda: iter([head]), kept, "the first line of standard input")
            return extractor(choose_columns(column_kinds([head]), wanted, "standard input"))
        for flag, names in (("--text-column", wanted), ("--keep-columns", kept)):
            if names:
                raise SourceError(
                    f"{flag} {','.join(names)} does not apply to standard input whose first line is no JSON object: "
                    "leave it out"
                )
        return None
