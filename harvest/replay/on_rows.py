"""Write hook points onto the rows of a cache that is there: every row is compared with the stored one."""

from __future__ import annotations

import contextlib
import filecmp
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae_granary.cache.errors import CacheMismatchError
from sae_granary.cache.format.layout import COLUMNS, DOCUMENTS
from sae_granary.cache.format.manifest import ShardRecord
from sae_granary.cache.read.reader import Cache
from sae_granary.cache.write.session import Session
from sae_granary.cache.write.writer import CacheWriter
from sae_granary.common.rows import DocumentRow, Rows


class RowsDifferError(CacheMismatchError):
    """The rows that a harvest gives again are not those of the cache."""

    def __init__(self, path: Path, message: str) -> None:
        self.path, self.differences, self.suggestion = path, {}, ""
        Exception.__init__(self, message)


class AddingWriter(CacheWriter):
    """A writer of a cache of added hook points; its shards are those of `base`, and so are its rows and documents."""

    base: Cache

    def on(self, base: Cache) -> None:
        """Say which cache the hook points are added to; before the first row."""
        self.base = base
        self._session = _SharingSession(self._session, base.path)

    def begin_block(self, block: int) -> None:
        """Say that the next rows are of a block, of a cache that was harvested in blocks."""
        self.block = block

    def end_block(self, last: ShardRecord) -> None:
        """Commit the last shard of a block. Raises RowsDifferError where the text gave too few rows."""
        shard = self.n_shards + (self._open_rows > 0)
        if shard <= last.shard or (self._open_rows and self._open_rows != last.n_rows):
            raise RowsDifferError(
                self.base.path,
                f"the text of block {last.block} ends after {self.n_rows:,} rows in all, {self.base.path} holds more",
            )
        self.end_shard()

    def append(self, rows: Rows, documents: Sequence[DocumentRow] = ()) -> None:
        """Add rows, as CacheWriter does. Raises RowsDifferError at the first one that is not that of the cache."""
        check_same_rows(self.base, self.n_rows, rows)
        if self._open_rows and self._open_rows == self.base.records[self.n_shards].n_rows:
            self.end_shard()  # short, where a harvest of the cache ended
        super().append(rows, documents)

    def finish(self, summary: Mapping[str, Any], provenance: Mapping[str, Any] | None = None) -> None:
        """Complete the cache, with the summary of the one that it was added to."""
        if self.n_rows != self.base.n_rows:
            raise RowsDifferError(
                self.base.path,
                f"the text gives {self.n_rows:,} rows, {self.base.path} holds {self.base.n_rows:,}: it ended too early",
            )
        super().finish(self.base.manifest.summary or {}, provenance)


def check_same_rows(base: Cache, start: int, rows: Rows) -> None:
    """Raise RowsDifferError at the first of these rows that is not row `start`, `start` + 1, ... of a cache."""
    there = max(0, min(rows.n_rows, base.n_rows - start))
    for name in COLUMNS:
        found, stored = getattr(rows, name)[:there], base.column(name)[start : start + there]
        if (different := np.flatnonzero(found != stored)).size:
            i = int(different[0])
            raise RowsDifferError(
                base.path,
                f"row {start + i:,} (document {int(base.column('doc_id')[start + i])}) has {name} {found[i]}, but "
                f"{base.path} holds {stored[i]}: the text or the tokenizer is not what was harvested",
            )
    if there < rows.n_rows:
        raise RowsDifferError(base.path, f"the text gives more than the {base.n_rows:,} rows that {base.path} holds")


class _SharingSession(Session):
    """Rows and documents are the cache's own files under another name, where the file system can do that."""

    def __init__(self, session: Session, base: Path) -> None:
        self.path, self.folder, self._base = session.path, session.folder, base

    def place(self, temporary: Mapping[str, Path], record_path: str, record: bytes) -> None:
        for path, source in temporary.items():
            if not path.startswith(("rows/", f"{DOCUMENTS}/")):
                continue
            if not filecmp.cmp(source, self._base / path, shallow=False):
                raise RowsDifferError(
                    self._base, f"{self._base / path} differs from what the text gives: it is not what was harvested"
                )
            shared = source.with_name(source.name + ".shared")
            with contextlib.suppress(OSError):
                os.link(self._base / path, shared)
                os.replace(shared, source)
        super().place(temporary, record_path, record)
