"""Codes of a cache or of texts, per row or pooled per document, in the requested format."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sae_granary.analyze.counted_rows import CountedFlags, keeps_first
from sae_granary.analyze.encoding.blocks import CodeBlock, stored_blocks
from sae_granary.analyze.encoding.codes import (
    ANOTHER_OUT,
    RECORD,
    CodesRecord,
    StoredCodes,
    check_arrays,
    check_identity,
    open_codes,
)
from sae_granary.analyze.encoding.csr_files import write_blocks
from sae_granary.analyze.encoding.document_columns import document_columns
from sae_granary.analyze.encoding.encode import Tick, csr_of
from sae_granary.analyze.encoding.export import DocumentColumns, write_npz, write_parquet
from sae_granary.analyze.encoding.pool import pool_documents
from sae_granary.analyze.encoding.text_rows import TextRows
from sae_granary.analyze.encoding.texts import encoded_blocks
from sae_granary.analyze.errors import AnalyzeError
from sae_granary.analyze.source import Source
from sae_granary.common.errors import ConfigError
from sae_granary.common.files import TEMP_PREFIX, shortage
from sae_granary.common.lock import FolderLock
from sae_granary.common.rows import FLAG_SPECIAL
from sae_granary.models.tokens.document import Document

SUFFIXES = {"granary": "", "npz": ".npz", "parquet": ".parquet"}  # by format


@dataclass(frozen=True)
class Output:
    """A folder for the format `granary`, else a file. `pool` is one of POOLINGS, or None for one row per row."""

    path: Path
    format: str = "granary"
    pool: str | None = None

    def check_new(self) -> None:
        """Raise ConfigError if the path exists."""
        if self.path.exists():
            raise ConfigError(f"{self.path} exists: give another --out, or remove it")


@dataclass
class Tally:
    """Which texts were encoded."""

    n_texts: int = 0
    n_encoded: int = 0
    first_without: int | None = None  # the first text without tokens
    _last: int = -1
    _digest: Any = field(default_factory=hashlib.sha256)

    def read(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield the documents and count them."""
        for document in documents:
            self.n_texts += 1
            self._digest.update(f"{document.doc_id}\n{document.text}\0".encode())
            yield document

    def encoded(self, doc_ids: NDArray[np.int64]) -> None:
        """Count the documents of some rows, in order."""
        ids = np.unique(doc_ids)
        new = ids[ids > self._last]
        if not len(new):
            return
        if self.first_without is None and int(new[-1]) - self._last > len(new):
            self.first_without = int(np.setdiff1d(np.arange(self._last + 1, int(new[-1])), new)[0])
        self.n_encoded += len(new)
        self._last = int(new[-1])

    def finish(self) -> None:
        """Raise AnalyzeError if no text has tokens."""
        if self.first_without is None and self.n_encoded < self.n_texts:
            self.first_without = self._last + 1
        if not self.n_encoded:
            raise AnalyzeError(f"none of {self.n_texts:,} texts holds tokens: give at least one text with words in it")

    @property
    def identity(self) -> dict[str, Any]:
        """Entry for the record of codes."""
        return {"n_texts": self.n_texts, "n_encoded": self.n_encoded, "sha256": self._digest.hexdigest()}


def write_cache_codes(source: Source, codes: StoredCodes, out: Output, tick: Tick = lambda n_rows: None) -> int:
    """Write stored codes of a cache pooled, or in another format. Returns the number of rows or documents.

    Complete pooled codes of the same SAE and cache are reused. Raises ConfigError if the output exists, LockedError
    while another process writes it, AnalyzeError if the disk is full, MismatchError for a folder with other codes,
    DamagedCodesError for damaged codes.
    """
    cache, identity = source.cache, source.identity | ({"pool": out.pool} if out.pool else {})
    if (n_rows := _stored(out, identity)) is not None:
        return n_rows
    doc_ids, flags = cache.column("doc_id"), cache.column("flags") if out.pool is None else CountedFlags(cache)
    with writing(out.path):
        if (n_rows := _stored(out, identity)) is not None:  # written until we had the lock
            return n_rows
        out.check_new()
        check_arrays(codes)
        if out.format == "npz" and out.pool is None:
            write_npz(out.path, codes, doc_ids)
            return len(codes)
        columns_of = document_columns(cache) if out.format == "parquet" else no_columns
        blocks = _ticked(stored_blocks(codes, doc_ids, flags, by_document=out.pool is not None), tick)
        return _write(out, blocks, codes.shape[1], identity, codes.record.device, columns_of)


def write_text_codes(
    source: Source, rows: TextRows, documents: Iterable[Document], out: Output, tick: Tick = lambda n_texts: None
) -> Tally:
    """Encode texts into an output, atomically; memory holds the rows of one buffer of texts, at most 256 MiB.

    Raises ConfigError if the output exists, LockedError while another process writes it, AnalyzeError if no text has
    tokens or the disk is full.
    """
    tally = Tally()
    identity: dict[str, Any] = {name: source.identity[name] for name in ("sae", "cache", "hooks")}
    identity |= {"pool": out.pool} if out.pool else {}

    def blocks() -> Iterator[CodeBlock]:
        for codes, block in encoded_blocks(source.sae, rows.blocks(tally.read(documents))):
            tally.encoded(block.doc_ids)
            special = block.flags & FLAG_SPECIAL != 0
            if out.pool is not None and not keeps_first(source.cache):
                special |= block.is_first
            yield CodeBlock(**csr_of(codes), doc_ids=block.doc_ids, special=special)
            tick(tally.n_encoded)
        tally.finish()
        identity["texts"] = tally.identity

    device = source.sae.core.W_dec.device.type
    with writing(out.path), torch.no_grad():
        out.check_new()
        _write(out, blocks(), source.sae.config.d_sae, identity, device, no_columns)
    return tally


def _write(
    out: Output,
    blocks: Iterable[CodeBlock],
    d_sae: int,
    identity: Mapping[str, Any],
    device: str,
    columns_of: DocumentColumns,
) -> int:
    if out.pool is not None:
        blocks = pool_documents(blocks, d_sae, out.pool)
    if out.format == "parquet":
        return write_parquet(out.path, blocks, columns_of, documents=out.pool is not None)
    if out.format == "granary":
        write_blocks(out.path, blocks, d_sae, identity, device)
        return len(open_codes(out.path))
    folder = out.path.with_name(f"{TEMP_PREFIX}{out.path.name}.codes")
    try:
        write_blocks(folder, blocks, d_sae, identity, device)
        codes = open_codes(folder)
        write_npz(out.path, codes, codes.doc_ids)
        return len(codes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _stored(out: Output, identity: Mapping[str, Any]) -> int | None:
    """The number of rows of codes that are there; None without any."""
    if out.format != "granary" or not (out.path / RECORD).is_file():
        return None
    check_identity(out.path, CodesRecord.read(out.path).identity, identity, ANOTHER_OUT)
    return len(open_codes(out.path))


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Context manager: no other process writes this output; a full disk raises AnalyzeError with the free space.

    Raises LockedError.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(out.with_name(f"{TEMP_PREFIX}{out.name}.lock"))
    lock.acquire()
    try:
        yield
    except OSError as error:
        if text := shortage(error, out):
            raise AnalyzeError(f"{text}; free some space and run the same command again") from None
        raise
    finally:
        lock.release()


def no_columns(doc_ids: NDArray[np.int64]) -> Mapping[str, Any]:
    """Columns of documents without metadata."""
    return {}


def _ticked(blocks: Iterable[CodeBlock], tick: Tick) -> Iterator[CodeBlock]:
    n_rows = 0
    for block in blocks:
        yield block
        n_rows += len(block.counts)
        tick(n_rows)
