"""Write a cache: append rows, roll shards, commit each one durably, continue where a killed harvest stopped.

    with CacheWriter.open(path, spec) as writer:
        writer.begin_buffer(source_state)
        writer.append(rows, documents)
        writer.finish(summary)

FORMAT.md, "Writing", gives the order in which files come into place; `session` does it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_granary.cache.errors import BadRowsError, CacheError
from sae_granary.cache.format.affine import Affine
from sae_granary.cache.format.layout import MANIFEST, commit_path
from sae_granary.cache.format.manifest import FileEntry, Manifest, finished, manifest_of
from sae_granary.cache.format.records import (
    committed,
    existing_manifest,
    load_records,
    refuse_mismatch,
    remove_contents,
)
from sae_granary.cache.format.signed import dump_signed
from sae_granary.cache.format.spec import CacheSpec, Cursor
from sae_granary.cache.format.zarr_json import zarr_files
from sae_granary.cache.write.calibrate import drift_warnings, fit_rows
from sae_granary.cache.write.committed import Committed
from sae_granary.cache.write.disk_space import no_space_is_clear
from sae_granary.cache.write.session import Session, concurrent_writes_are_clear, locked, remove_leftovers
from sae_granary.cache.write.shard import OpenShard
from sae_granary.cache.write.spec_json import plain_json, plain_spec, vocabulary_bytes
from sae_granary.cache.write.split import check_rows, documents_by_row, shard_parts
from sae_granary.common.lock import FolderLock
from sae_granary.common.rows import DocumentRow, Rows


class CacheWriter:
    """The one writer of a cache; see the module's docstring. Made by `open`, closed by `with`."""

    def __init__(self, path: Path, manifest: Manifest, committed: Committed, *, extend: bool, **how: Any) -> None:
        self.path, self.manifest = path, manifest
        self.warnings: list[str] = []  # about what is lost by storing rows
        self.layout = manifest.layout
        self.complete = manifest.complete and not extend
        self.committed = committed
        self._last_document = self.committed.last_document  # those of the open shard included
        self.block: int | None = None  # of the next shards, in a cache that was harvested in blocks
        self._source: Mapping[str, int] | None = None
        self._buffer_rows = 0
        self._shard: OpenShard | None = None
        self._how, self._broken = how, False
        self._lock: FolderLock | None = None
        self._session = Session(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str], spec: CacheSpec, *, extend: bool = False, **how: Any) -> CacheWriter:
        """Create a cache, or continue an unfinished one of the same spec; with `extend` also a finished one.

        The bytes are the same with `direct=True` (rows go past the page cache, see `cache.write.chunk_file`) and any
        `n_threads`. Of a finished one that is not extended, `complete` is true and nothing is locked or written. One
        that is extended stays as it is for its readers until `finish`. Raises CacheExistsError where the folder holds
        something else, CacheMismatchError where it holds another harvest, CacheLockedError while it is written.
        """
        path = Path(path)
        vocabulary = vocabulary_bytes(spec.vocabulary)
        want = manifest_of(plain_spec(spec), None if vocabulary is None else FileEntry.of(vocabulary))
        have = existing_manifest(path)
        if have is not None:
            refuse_mismatch(path, have, want)
            if have.complete and not extend:
                remove_leftovers(path)
                return cls(path, have, Committed.of(have.shards), extend=False, **how)
        with no_space_is_clear(path):
            return cls._open_locked(path, want, vocabulary, extend=extend, **how)

    @classmethod
    def _open_locked(cls, path: Path, want: Manifest, vocabulary: bytes | None, **options: Any) -> CacheWriter:
        lock = locked(path, make=True)
        with concurrent_writes_are_clear(path), contextlib.ExitStack() as undo:
            undo.callback(lock.release)
            have = existing_manifest(path)  # again: another process may have written before we held the lock
            if have is not None and refuse_mismatch(path, have, want):
                remove_contents(path, have.layout)  # of another harvest that committed nothing
                have = None
            begun, records = (want, ()) if have is None else committed(path, have)
            begun = have if have is not None and have.complete else begun
            writer = cls(path, begun, Committed.of(records), **options)
            writer._lock = lock
            undo.callback(writer.close)
            if not writer.complete:
                writer._session.begin(begun, vocabulary, len(records), new=have is None)
            undo.pop_all()
            return writer

    def tell(self, provenance: Mapping[str, Any]) -> None:
        """Replace the provenance in the manifest."""
        self.manifest = replace(self.manifest, provenance=dict(provenance))
        self._session.replace(MANIFEST, dump_signed(self.manifest.to_json()))

    @property
    def cursor(self) -> Cursor | None:
        """Where the source continues after the committed rows; None if none are committed."""
        return self.committed.cursor

    @property
    def n_shards(self) -> int:
        """Committed shards."""
        return self.committed.n_shards

    @property
    def n_rows(self) -> int:
        """Rows so far, those of the open shard included."""
        return self.committed.n_rows + self._open_rows

    @property
    def bytes_written(self) -> int:
        """Bytes so far, those of the open shard's rows included."""
        return self.committed.n_bytes + self._open_rows * sum(array.row_bytes for array in self.layout.arrays)

    @property
    def _open_rows(self) -> int:
        return 0 if (shard := self._shard) is None else shard.n_rows  # read once: another thread may ask

    def begin_buffer(self, source_state: Mapping[str, int]) -> None:
        """Say that the next rows come from a new sort buffer, which a resume can rebuild from this state."""
        self._source = {str(key): int(value) for key, value in source_state.items()}
        self._buffer_rows = 0

    def skip(self, n_rows: int) -> None:
        """Say that the first n rows of this buffer are committed already and will not be appended."""
        self._buffer_rows += n_rows

    def append(self, rows: Rows, documents: Sequence[DocumentRow] = ()) -> None:
        """Add rows of whole windows, in source order, and the documents whose first row is among them.

        Documents that are stored already are left out, so that a resume may pass them again. Raises BadActivationError
        for a NaN, an Inf or an overflow of the stored dtype; after any error the writer takes no more rows.
        """
        if self._source is None:
            raise BadRowsError("append before begin_buffer: a resume would not know where to start")
        with self._breaking():
            last = self._shard.last_window if self._shard else self.committed.last_window
            check_rows(rows, self.layout, last)
            placed = documents_by_row(documents, rows.doc_id, self._last_document)
            if not self.layout.is_fitted:  # a resume without committed shards fits the same rows again
                affines, self.warnings = fit_rows(rows.activations, self.layout)
                self.fit(affines)
            for part in shard_parts(rows, placed, self._open_rows, self.manifest.rows_per_shard):
                if part is None:
                    self._commit()
                else:
                    self._append(*part)

    def fit(self, affines: Mapping[str, Affine] | None) -> None:
        """Take steps and offsets; without this, before the first rows, those are fitted to them."""
        self.manifest = replace(self.manifest, affines=affines)
        self.layout = self.manifest.layout
        self._session.write_zarr(self.layout, 0)

    def _append(self, rows: Rows, documents: list[DocumentRow]) -> None:
        if self._shard is None:
            folder, kept = self._session.folder / f"{self.n_shards:08d}", self.manifest.kept_columns
            self._shard = OpenShard(self.layout, self.n_shards, folder, kept_columns=kept, **self._how)
        self._shard.append(rows, documents)
        self._buffer_rows += rows.n_rows
        if documents:
            self._last_document = documents[-1].doc_id
        if self._shard.n_rows == self.manifest.rows_per_shard:
            self._commit()

    def end_shard(self) -> None:
        """Commit the open shard, however few rows it holds; the next rows start another."""
        with self._breaking():
            self._commit()

    def finish(self, summary: Mapping[str, Any], provenance: Mapping[str, Any] | None = None) -> None:
        """Commit the last shard, which may be short, and mark the cache complete; `provenance` replaces the old."""
        if self.complete:
            return
        with self._breaking():
            if self.n_rows == 0:
                raise CacheError(f"{self.path}: no rows were harvested, and an empty cache is not written")
            plain_summary = plain_json(summary, "summary")
            self._commit()
            if self.n_shards > len(self.manifest.shards):
                records = load_records(self.path, self.manifest)
                zarr = {path: FileEntry.of(data) for path, data in zarr_files(self.layout, self.n_shards).items()}
                self._session.write_zarr(self.layout, self.n_shards, durable=True)
                self.manifest = finished(self.manifest, records, zarr, plain_summary)
                self.tell(self.manifest.provenance if provenance is None else provenance)
            self.complete = True

    def _commit(self) -> None:
        if self._shard is None:
            return
        temporary, record = self._shard.finish(Cursor(dict(self._source or {}), self._buffer_rows), self.block)
        body = dump_signed({"version": self.manifest.version, **record.to_json()})
        self._session.place(temporary, commit_path(record.shard), body)
        self._shard.discard()
        self._shard = None
        self.committed = self.committed.after(record)
        self.warnings += drift_warnings(record.shard, record.statistics or {})
        if not self.manifest.complete:
            self._session.write_zarr(self.layout, self.n_shards)

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        if self.complete:
            raise BadRowsError(f"{self.path} is complete; rows are not added to a finished harvest")
        if self._broken:
            raise BadRowsError(f"{self.path}: the writer stopped at an error; open it again to continue")
        whole_shard = self.layout.bytes_of(self.manifest.rows_per_shard)
        try:
            with concurrent_writes_are_clear(self.path), no_space_is_clear(self.path, whole_shard):
                yield
        except BaseException:
            self._broken = True
            raise

    def close(self) -> None:
        """Drop the open shard and release the lock; committed shards stay."""
        if self._lock is None:
            return
        empty = False
        try:
            if self._shard is not None:
                self._shard.discard()
                self._shard = None
            empty = self._session.end(self.layout, complete=self.complete)
        finally:
            self._lock.release()
            self._lock = None
        if empty:
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
