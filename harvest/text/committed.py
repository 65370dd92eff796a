"""Continuing a harvest: check that the text is the one whose rows are committed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sae_granary.cache.read.reader import open_local
from sae_granary.common.rows import DocumentRow
from sae_granary.harvest.errors import HarvestError
from sae_granary.harvest.text.document import TextSource, documents
from sae_granary.models.tokens.contexts import Tokenize
from sae_granary.models.tokens.document import Document, Render


def continued(
    source: TextSource, path: Path, next_doc: int, render: Render, tokenize: Tokenize, *, compare: bool
) -> Iterator[Document]:
    """The documents from `next_doc` on; with `compare` each is held against the text that the cache stores of it.

    A source that reads what it skips is compared from its first document on. Raises HarvestError.
    """
    docs = documents(source, next_doc if source.seekable else 0, render)
    if not compare:
        yield from docs if source.seekable else (document for document in docs if document.doc_id >= next_doc)
        return
    cache = open_local(path, allow_incomplete=True)
    last = max((record.documents.last for record in cache.records if record.documents is not None), default=-1)
    doc_id = -1
    for document in docs:
        doc_id = document.doc_id
        if doc_id <= last and not _same(document, stored := cache.find_document(doc_id), tokenize):
            raise HarvestError(
                f"{document.source}, record {document.row}: this is not the text whose rows are committed in {path} "
                f"({_difference(document, stored)}); restore the text, or harvest to another --out"
            )
        if doc_id >= next_doc:
            yield document
    if doc_id < last:
        raise HarvestError(
            f"{source.name} ends after {doc_id + 1:,} records, but rows of {last + 1:,} are committed in {path}; "
            "restore the text, or harvest to another --out"
        )


def _same(document: Document, stored: DocumentRow | None, tokenize: Tokenize) -> bool:
    if stored is not None:
        return document.skipped is None and (document.text, document.columns) == (stored.text, stored.columns)
    return document.skipped is not None or not len(tokenize([document.text])[0])


def _difference(document: Document, stored: DocumentRow | None) -> str:
    if stored is None:
        return "it had no text"
    if document.skipped is not None:
        return f"it is skipped now: {document.skipped.replace('_', ' ')}"
    if document.text == stored.text:
        name = next(name for name, value in stored.columns.items() if document.columns.get(name) != value)
        return f"column {name!r} is {document.columns.get(name)!r:.60}, it was {stored.columns[name]!r:.60}"
    pairs = zip(document.text, stored.text, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(document.text), len(stored.text)))
    return f"they differ at character {same:,}"
