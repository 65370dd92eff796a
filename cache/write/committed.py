"""Totals of a cache's commit records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

from sae_granary.cache.format.manifest import ShardRecord
from sae_granary.cache.format.spec import Cursor


@dataclass(frozen=True)
class Committed:
    """The committed shards of a cache that is being written."""

    n_shards: int = 0
    n_rows: int = 0
    n_bytes: int = 0
    last_window: int = -1
    n_documents: int = 0  # with their first row in these shards
    last_document: int = -1  # the last one that is stored
    cursor: Cursor | None = None  # where the source continues

    @classmethod
    def of(cls, records: Iterable[ShardRecord]) -> Committed:
        """What all these records add up to."""
        return reduce(cls.after, records, cls())

    def after(self, record: ShardRecord) -> Committed:
        """The same with one more shard."""
        documents = record.documents
        return Committed(
            self.n_shards + 1,
            self.n_rows + record.n_rows,
            self.n_bytes + record.n_bytes,
            record.last_window,
            self.n_documents + (0 if documents is None else documents.n),
            self.last_document if documents is None else documents.last,
            record.cursor,
        )
