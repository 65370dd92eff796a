"""A committed shard written once more, to be compared with its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sae_granary.cache.format.layout import CacheLayout
from sae_granary.cache.format.manifest import Manifest, ShardRecord
from sae_granary.cache.format.spec import Cursor
from sae_granary.cache.write.committed import Committed
from sae_granary.cache.write.shard import OpenShard
from sae_granary.cache.write.split import documents_by_row
from sae_granary.common.rows import DocumentRow, Rows


class Unwritten:
    """Takes the rows of a harvest behind committed shards, as a CacheWriter does, and commits none."""

    def __init__(self, path: Path, committed: Committed) -> None:
        self.path, self.committed = path, committed
        self.cursor: Cursor | None = committed.cursor
        self.warnings: list[str] = []
        self.layout: CacheLayout | None = None  # of what is written

    @property
    def n_rows(self) -> int:
        """Rows so far, those of the earlier shards included."""
        return self.committed.n_rows

    @property
    def bytes_written(self) -> int:
        """Bytes of the earlier shards."""
        return self.committed.n_bytes

    def begin_buffer(self, source_state: Mapping[str, int]) -> None:
        """The record has the cursor."""

    def skip(self, n_rows: int) -> None:
        """The record has the cursor."""

    def append(self, rows: Rows, documents: Sequence[DocumentRow] = ()) -> None:
        """Drop the rows."""


class ShardAgain(Unwritten):
    """Takes the rows from the end of the earlier shards on, and keeps those of one shard in a temporary folder."""

    def __init__(self, path: Path, manifest: Manifest, shard: int, folder: Path) -> None:
        self._record, self.layout = manifest.shards[shard], manifest.layout
        block = self._record.block  # whose harvest knows nothing of earlier blocks
        super().__init__(path, Committed.of(record for record in manifest.shards[:shard] if record.block == block))
        self._shard = OpenShard(manifest.layout, shard, folder, kept_columns=manifest.kept_columns, direct=False)

    @property
    def n_rows(self) -> int:
        """Rows so far, those of the earlier shards included."""
        return self.committed.n_rows + self._shard.n_rows

    def append(self, rows: Rows, documents: Sequence[DocumentRow] = ()) -> None:
        """Take rows as long as they are of this shard."""
        n_rows = min(rows.n_rows, self._record.n_rows - self._shard.n_rows)
        placed = documents_by_row(documents, rows.doc_id, self.committed.last_document)
        if n_rows:
            self._shard.append(rows[:n_rows], [document for row, document in placed if row < n_rows])

    def finished(self) -> tuple[dict[str, Path], ShardRecord]:
        """Its files by their path in the cache, and its record."""
        return self._shard.finish(self._record.cursor, self._record.block)

    def discard(self) -> None:
        """Close and remove its files."""
        self._shard.discard()
