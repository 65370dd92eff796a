"""What the commit records of a cache add up to."""

from __future__ import annotations

from dataclasses import dataclass

from sae_granary.cache.format.manifest import ShardRecord
from sae_granary.cache.format.spec import Cursor


@dataclass(frozen=True)
class Committed:
    """The committed shards of a cache that is being written."""

    n_shards: int = 0
    n_rows: int = 0
    n_bytes: int = 0
    last_window: int = -1
    last_document: int = -1  # the last one that is stored
    cursor: Cursor | None = None  # where the source continues

    def after(self, record: ShardRecord) -> Committed:
        """The same with one more shard."""
        documents = record.documents
        return Committed(
            self.n_shards + 1,
            self.n_rows + record.n_rows,
            self.n_bytes + record.n_bytes,
            record.last_window,
            self.last_document if documents is None else documents.last,
            record.cursor,
        )
