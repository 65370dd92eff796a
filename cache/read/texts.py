"""The texts that the rows of a cache come from: documents, tokens, contexts."""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from sae_granary.cache.errors import CorruptCacheError, RowLookupError, UnknownNameError
from sae_granary.cache.format.layout import VOCABULARY, documents_path
from sae_granary.cache.format.manifest import Manifest, ShardRecord
from sae_granary.cache.format.signed import read_bytes
from sae_granary.cache.format.spec import Unit
from sae_granary.cache.read.arrays import Column
from sae_granary.cache.read.context import Context, join_tokens, rows_around
from sae_granary.common.errors import nearest
from sae_granary.common.rows import DocumentRow, Scalar
from sae_granary.common.signed import digest


class RowTexts:
    """The part of an open cache that reads no activations."""

    path: Path
    manifest: Manifest
    records: Sequence[ShardRecord]
    kept_columns: tuple[str, ...]
    unit: Unit

    def __len__(self) -> int:
        raise NotImplementedError

    def column(self, name: str) -> Column:
        """Position metadata."""
        raise NotImplementedError

    def document(self, row: int) -> DocumentRow:
        """The document that a row comes from."""
        doc_id = int(self.column("doc_id")[row])
        document = self.find_document(doc_id)
        if document is None:
            raise RowLookupError(f"{self.path}: document {doc_id} of row {row} is not stored")
        return document

    def find_document(self, doc_id: int) -> DocumentRow | None:
        """The document of an id, or None where none of its rows were stored."""
        from sae_granary.cache.format.documents import read_document  # pyarrow

        lasts, files = self._document_files
        i = bisect.bisect_left(lasts, doc_id)
        return read_document(files[i], doc_id, self.kept_columns) if i < len(files) else None

    def document_ids(self) -> list[int]:
        """The ids of all stored documents, ascending."""
        from sae_granary.cache.format.documents import read_doc_ids

        return [doc_id for file in self._document_files[1] for doc_id in read_doc_ids(file)]

    def document_column(self, name: str) -> list[Scalar]:
        """A column that the harvest kept (`--keep-columns`), one value per document, in the order of `document_ids`.

        Raises UnknownNameError, which names the columns that were kept.
        """
        from sae_granary.cache.format.documents import read_kept_column

        if name not in self.kept_columns:
            there = f"it keeps {', '.join(self.kept_columns)}" if self.kept_columns else "it keeps none"
            raise UnknownNameError(
                f"{self.path} keeps no column {name!r} of its documents{nearest(name, self.kept_columns)}: {there}; "
                "harvest again with --keep-columns"
            )
        return [value for file in self._document_files[1] for value in read_kept_column(file, name)]

    @cached_property
    def _document_files(self) -> tuple[list[int], list[Path]]:
        """The last id of each file of documents, and the files, in the order of their ids."""
        found = [(record.documents.last, record.shard) for record in self.records if record.documents is not None]
        return [last for last, _ in found], [self.path / documents_path(shard) for _, shard in found]

    @cached_property
    def vocabulary(self) -> list[str] | None:
        """Token id -> string as the tokenizer writes it, or None where the harvest stored none."""
        if self.manifest.vocabulary is None:
            return None
        data = read_bytes(self.path / VOCABULARY)
        if digest(data) != self.manifest.vocabulary.xxh3:
            raise CorruptCacheError(f"{self.path / VOCABULARY}: the checksum does not fit; restore it from a copy")
        words: list[str] = json.loads(data)
        return words

    def token(self, row: int) -> str | int:
        """The token of a row: its string where the cache has a vocabulary, else its id."""
        if self.unit == "text":
            raise RowLookupError(f"{self.path}: a row is a whole text here, not a token; use document(row)")
        token_id = int(self.column("token_id")[row])
        words = self.vocabulary
        return words[token_id] if words is not None and 0 <= token_id < len(words) else token_id

    def context(self, row: int, before: int = 10, after: int = 10) -> Context:
        """The tokens around a row in its own document, and their text. Special tokens are left out."""
        row = int(row) + (len(self) if row < 0 else 0)
        document = self.find_document(int(self.column("doc_id")[row]))
        if self.unit == "text":
            return Context(row, (row,), (), -1, document.text if document else "", document)
        rows = rows_around(self.column("doc_id"), self.column("flags"), row, before, after)
        tokens = tuple(self.token(r) for r in rows)
        return Context(row, tuple(rows), tokens, rows.index(row), join_tokens(tokens), document)
