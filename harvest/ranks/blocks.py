"""A block: contiguous documents of the source, harvested on their own, and what came of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sae_granary.common.rows import Scalar
from sae_granary.common.signed import DamagedFileError, Fields, sign
from sae_granary.harvest.text.document import Record, TextSource
from sae_granary.models.tokens.contexts import StreamState

WINDOW_BITS = 32  # windows of block b are numbered from b << 32


def begin_of(block: int, block_docs: int) -> StreamState:
    """Where the harvest of a block starts."""
    return StreamState(next_doc=block * block_docs, next_window=block << WINDOW_BITS)


@dataclass(frozen=True)
class Outcome:
    """A block that is complete."""

    n_records: int  # of the source; fewer than a block holds where the source ended
    n_rows: int
    n_documents: int  # with rows
    counts: Mapping[str, int]  # repaired, and skipped by reason
    folder: str  # of its cache, below that of the blocks
    limited: bool  # whether the harvest could end inside of it: what comes before was known

    def to_bytes(self) -> bytes:
        """As it is written."""
        return sign({**vars(self), "counts": dict(self.counts)})

    @classmethod
    def read(cls, path: Path) -> Outcome | None:
        """The outcome in a file; None where there is none yet. Raises DamagedFileError."""
        if not os.path.exists(path):
            return None
        try:
            fields = Fields.of_file(path, "remove it, and its block is harvested again", signed_since=1)
        except DamagedFileError:
            if not os.path.exists(path):  # the harvest has finished, and its blocks were removed
                return None
            raise
        counts = fields.nested("counts")
        return cls(
            fields.integer("n_records"),
            fields.integer("n_rows"),
            fields.integer("n_documents"),
            {name: counts.integer(name) for name in counts.body},
            fields.get("folder", str),
            fields.get("limited", bool),
        )

    @classmethod
    def of_summary(cls, summary: Mapping[str, Any], folder: str, *, limited: bool) -> Outcome:
        """The outcome of a block whose cache has this summary."""
        counts = {name: n for name, n in summary.items() if name == "repaired" or name.startswith("skipped_")}
        return cls(summary["n_records"], summary["n_rows"], summary["n_documents"], counts, folder, limited)


class Records:
    """The records of a source, read forwards: a process that takes later and later blocks reads its text once."""

    def __init__(self, source: TextSource) -> None:
        self._source = source
        self._stream: Iterator[Record] | None = None
        self._position = 0

    def between(self, start: int, stop: int) -> Iterator[Record]:
        """Records start..stop; fewer where the source ends."""
        far = start != self._position if self._source.seekable else start < self._position
        if self._stream is None or far:
            self._stream, self._position = self._source.records(start), start
        stream = self._stream
        self._stream = None  # an error of the source must not look like its end
        for record in islice(stream, stop - self._position):
            self._position += 1
            if self._position > start:
                yield record
        self._stream = stream


class BlockSource:
    """The records of one block as a source; their ordinals count from the start of the whole."""

    seekable = True

    def __init__(self, whole: TextSource, records: Records, stop: int) -> None:
        self._whole, self._records, self._stop = whole, records, stop

    @property
    def name(self) -> str:
        """That of the whole source."""
        return self._whole.name

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of the whole source."""
        return self._whole.columns

    @property
    def identity(self) -> Mapping[str, Scalar]:
        """That of the whole source."""
        return self._whole.identity

    def records(self, start: int) -> Iterator[Record]:
        """Records from ordinal `start` to the end of the block."""
        return self._records.between(start, self._stop)

    def n_bytes(self) -> int | None:
        """Not known."""
        return None
