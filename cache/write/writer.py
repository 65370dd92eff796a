"""Write a cache: append rows, roll shards, commit each one durably, continue where a killed harvest stopped.

    with CacheWriter.open(path, spec) as writer:
        writer.begin_buffer(source_state)
        writer.append(rows, documents)
        writer.finish(summary)

A shard is committed in this order: its files are synced under temporary names, linked into place, their folders
synced; then its record is synced and linked into commits/, and that folder synced. A shard exists when its record does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from sae_granary.cache.errors import BadRowsError, CacheError, ConcurrentWriteError
from sae_granary.cache.format.layout import GROUPS, LOCK, MANIFEST, VOCABULARY, commit_path, zarr_files
from sae_granary.cache.format.manifest import FileEntry, Manifest, ShardRecord, manifest_of
from sae_granary.cache.format.records import (
    clear_uncommitted,
    existing_manifest,
    has_records,
    load_records,
    refuse_mismatch,
    remove_contents,
)
from sae_granary.cache.format.signed import dump_signed
from sae_granary.cache.format.spec import CacheSpec, Cursor
from sae_granary.cache.format.stats import merge_all
from sae_granary.cache.write.session import ZARR_ATTRIBUTES, Session, remove_leftovers
from sae_granary.cache.write.shard import OpenShard
from sae_granary.cache.write.spec_json import plain_json, plain_spec, vocabulary_bytes
from sae_granary.cache.write.split import check_rows, documents_by_row, split_windows, window_lengths
from sae_granary.common import files
from sae_granary.common.lock import CacheLock
from sae_granary.common.rows import DocumentRow, Rows


class CacheWriter:
    """The one writer of a cache; see the module's docstring. Made by `open`, closed by `with`."""

    def __init__(self, path: Path, manifest: Manifest, records: Sequence[ShardRecord]) -> None:
        self.path, self.manifest = path, manifest
        self.layout = manifest.layout
        self.complete = manifest.complete
        self.cursor: Cursor | None = records[-1].cursor if records else None
        self.n_shards = len(records)
        self._committed_rows = sum(record.n_rows for record in records)
        self._committed_bytes = sum(record.n_bytes for record in records)
        self._last_window = records[-1].last_window if records else -1
        stored = [record.documents.last for record in records if record.documents is not None]
        self._last_document = stored[-1] if stored else -1
        self._source: Mapping[str, int] | None = None
        self._buffer_rows = 0
        self._shard: OpenShard | None = None
        self._broken = self._direct = False
        self._lock: CacheLock | None = None
        self._session = Session(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str], spec: CacheSpec, *, direct: bool = False) -> CacheWriter:
        """Create a cache, or continue an unfinished one of the same spec.

        With `direct` rows go past the page cache (see `cache.write.chunk_file`); the bytes are the same.
        Of a finished one, `complete` is true and nothing is locked or written. Raises CacheExistsError where the folder
        holds something else, CacheMismatchError where it holds another harvest, CacheLockedError while it is written.
        """
        path = Path(path)
        vocabulary = vocabulary_bytes(spec)
        want = manifest_of(plain_spec(spec), None if vocabulary is None else FileEntry.of(vocabulary))
        have = existing_manifest(path)
        if have is not None:
            refuse_mismatch(path, have, want)
            if have.complete:
                remove_leftovers(path)
                return cls(path, have, have.shards)
        with files.no_space_is_clear(path):
            return cls._open_locked(path, want, vocabulary, direct=direct)

    @classmethod
    def _open_locked(cls, path: Path, want: Manifest, vocabulary: bytes | None, *, direct: bool) -> CacheWriter:
        path.mkdir(parents=True, exist_ok=True)
        lock = CacheLock(path / LOCK)
        lock.acquire()
        writer = None
        try:
            have = existing_manifest(path)  # again: another process may have written before we held the lock
            if have is not None and refuse_mismatch(path, have, want):
                remove_contents(path)  # of another harvest that committed nothing
                have = None
            records = [] if have is None else have.shards or load_records(path, have)
            writer = cls(path, have or want, records)
            writer._lock, writer._direct = lock, direct
            if not writer.complete:
                writer._prepare(vocabulary, new=have is None)
            return writer
        except BaseException as error:
            if writer is not None:
                writer.close()
            lock.release()
            if isinstance(error, FileExistsError) and not isinstance(error, CacheError):
                raise ConcurrentWriteError(f"{path}: another process writes here in spite of the lock") from error
            raise

    def _prepare(self, vocabulary: bytes | None, *, new: bool) -> None:
        self._session.begin()
        if new:
            self._session.put(MANIFEST, dump_signed(self.manifest.to_json()))
        for folder in (*GROUPS, "commits", "documents", *(array.path for array in self.layout.arrays)):
            (self.path / folder).mkdir(exist_ok=True)
        if vocabulary is not None and not (self.path / VOCABULARY).exists():
            self._session.put(VOCABULARY, vocabulary)
        clear_uncommitted(self.path, self.layout, self.n_shards)
        self._session.write_zarr(self.layout, self.n_shards)
        files.sync_folder(self.path)

    @property
    def n_rows(self) -> int:
        """Rows so far, those of the open shard included."""
        return self._committed_rows + self._open_rows

    @property
    def bytes_written(self) -> int:
        """Bytes so far, those of the open shard's rows included."""
        row_bytes = sum(array.row_bytes for array in self.layout.arrays)
        return self._committed_bytes + self._open_rows * row_bytes

    @property
    def _open_rows(self) -> int:
        shard = self._shard  # once: a progress display may ask from another thread
        return 0 if shard is None else shard.n_rows

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
        self._usable()
        with self._breaking():
            last = self._shard.last_window if self._shard else self._last_window
            check_rows(rows, self.layout, last)
            placed = documents_by_row(documents, rows.doc_id, self._last_document)
            used, start = (self._shard.n_rows if self._shard else 0), 0
            for n_rows in split_windows(window_lengths(rows.window), used, self.manifest.rows_per_shard):
                stop = start + n_rows
                if n_rows == 0:
                    self._commit()
                    continue
                self._append(rows[start:stop], [document for row, document in placed if start <= row < stop])
                start = stop
                if start < rows.n_rows:
                    self._commit()

    def _append(self, rows: Rows, documents: list[DocumentRow]) -> None:
        if self._shard is None:
            folder = self._session.folder / f"{self.n_shards:08d}"
            self._shard = OpenShard(self.layout, self.n_shards, folder, direct=self._direct)
        self._shard.append(rows, documents)
        self._buffer_rows += rows.n_rows
        if documents:
            self._last_document = documents[-1].doc_id
        if self._shard.rows_left == 0:
            self._commit()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Commit the last shard, which may be short, and mark the cache complete. Nothing if it is complete already."""
        if self.complete:
            return
        self._usable()
        with self._breaking():
            if self._shard is None and self.n_shards == 0:
                raise CacheError(f"{self.path}: no rows were harvested, and a cache of none is not written")
            plain_summary = plain_json(summary, "summary")
            self._commit()
            records = load_records(self.path, self.manifest)
            statistics = {
                hook: merge_all(record.statistics[hook] for record in records if record.statistics)
                for hook in self.layout.activations
            }
            zarr = zarr_files(self.layout, self.n_shards, ZARR_ATTRIBUTES)
            self.manifest = replace(
                self.manifest,
                complete=True,
                shards=tuple(replace(record, statistics=None) for record in records),
                statistics=statistics,
                zarr_files={path: FileEntry.of(data) for path, data in zarr.items()},
                summary=plain_summary,
            )
            self._session.replace(MANIFEST, dump_signed(self.manifest.to_json()))
            self.complete = True

    def _commit(self) -> None:
        if self._shard is None:
            return
        shard, index = self._shard, self._shard.index
        temporary, entries, moments = shard.finish()
        record = ShardRecord(
            shard=index,
            n_rows=shard.n_rows,
            first_window=shard.first_window,
            last_window=shard.last_window,
            documents=shard.documents.range,
            cursor=Cursor(dict(self._source or {}), self._buffer_rows),
            files=entries,
            statistics=moments,
        )
        self._session.place(temporary, commit_path(index), dump_signed(record.to_json()))
        shard.discard()
        self._shard = None
        self.n_shards += 1
        self.cursor = record.cursor
        self._committed_rows += record.n_rows
        self._committed_bytes += record.n_bytes
        self._last_window = record.last_window
        self._session.write_zarr(self.layout, self.n_shards)

    def _usable(self) -> None:
        if self.complete:
            raise BadRowsError(f"{self.path} is complete; rows are not added to a finished harvest")
        if self._broken:
            raise BadRowsError(f"{self.path}: the writer stopped at an error; open it again to continue")

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        whole_shard = sum(self.layout.shard_files(0, self.manifest.rows_per_shard).values())
        try:
            with files.no_space_is_clear(self.path, whole_shard):
                yield
        except (FileExistsError, FileNotFoundError) as error:  # a name was taken, or our temporary file removed
            self._broken = True
            if isinstance(error, CacheError):
                raise
            raise ConcurrentWriteError(
                f"{self.path}: another process writes the same shard ({error}); stop one of the two and run the "
                "command again: it continues after the last committed shard"
            ) from error
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
            self._session.end()
            empty = not self.complete and not has_records(self.path)
            if empty:
                remove_contents(self.path)  # nothing was committed: leave nothing behind
        finally:
            self._lock.release()
            self._lock = None
        if empty:
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
