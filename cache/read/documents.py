"""The documents of a cache: by id, and a kept column of all of them."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sae_granary.cache.errors import UnknownNameError
from sae_granary.cache.format.layout import documents_path
from sae_granary.common.errors import nearest
from sae_granary.common.rows import DocumentRow, Scalar

if TYPE_CHECKING:
    from sae_granary.cache.format.manifest import ShardRecord


class Documents:
    """The stored documents of all committed shards, in the order of their ids; `Cache` hands its questions on."""

    def __init__(self, path: Path, records: Sequence[ShardRecord], kept_columns: tuple[str, ...]) -> None:
        self._path, self._kept = path, kept_columns
        found = [(record.documents.last, record.shard) for record in records if record.documents is not None]
        self._lasts = [last for last, _ in found]
        self._files = [path / documents_path(shard) for _, shard in found]

    def find(self, doc_id: int) -> DocumentRow | None:
        """The document of an id, or None where it is not stored."""
        from sae_granary.cache.format.documents import read_document  # pyarrow

        i = bisect.bisect_left(self._lasts, doc_id)
        return read_document(self._files[i], doc_id, self._kept) if i < len(self._files) else None

    def ids(self) -> list[int]:
        """The ids of all documents, ascending."""
        from sae_granary.cache.format.documents import read_doc_ids

        return [doc_id for file in self._files for doc_id in read_doc_ids(file)]

    def column(self, name: str) -> list[Scalar]:
        """A kept column, one value per document in the order of `ids`. Raises UnknownNameError naming those kept."""
        from sae_granary.cache.format.documents import read_kept_column

        if name not in self._kept:
            there = f"it keeps {', '.join(self._kept)}" if self._kept else "it keeps none"
            raise UnknownNameError(
                f"{self._path} keeps no column {name!r} of its documents{nearest(name, self._kept)}: {there}; "
                "harvest again with --keep-columns"
            )
        return [value for file in self._files for value in read_kept_column(file, name)]
