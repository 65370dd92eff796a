"""The open shard: rows streamed into temporary files, statistics on the way, one inner chunk per array in memory.

Every sum runs over inner chunks counted from the start of the shard, so that the result does not depend on how many
rows come per call.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import xxhash

from cache import files
from cache.dtypes import Array
from cache.errors import BadActivationError
from cache.layout import COLUMNS, ArrayLayout, CacheLayout, documents_path
from cache.manifest import FileEntry
from cache.parquet import DocumentFile
from cache.rows import DocumentRow, Rows
from cache.stats import Moments, block_moments

SYNC_BYTES = 32 * 2**20  # what is written is sent to the disk after so many bytes, while the next rows are checked


class ArrayStream:
    """One array of the open shard: rows collect in an inner chunk, full ones go to the file."""

    def __init__(
        self, layout: ArrayLayout, path: Path, syncer: Executor, on_chunk: Callable[[Array], None] | None = None
    ) -> None:
        self.layout, self.path = layout, path
        self.n_rows = 0
        self._syncer, self._syncing, self._unsynced = syncer, Future[None](), 0
        self._syncing.set_result(None)
        self._on_chunk = on_chunk  # sees the stored rows of every chunk once
        self._chunk, self._filled = layout.block(), 0
        self._hasher = xxhash.xxh3_128()
        self._n_bytes = 0
        self._fd = files.create(path)

    def append(self, values: Array, check: Callable[[int], None] | None = None) -> None:
        """Add rows, cast to the stored type; `check(i)` is called when row i came out as NaN or Inf."""
        done = 0
        while done < len(values):
            take = min(len(values) - done, self.layout.inner_rows - self._filled)
            room = self._chunk[self._filled : self._filled + take]
            with np.errstate(over="ignore", invalid="ignore"):
                room[...] = values[done : done + take]
            if check is not None and (bad := self.layout.storage.first_non_finite(room)) is not None:
                check(done + bad // (self.layout.width or 1))
            done += take
            self._filled += take
            self.n_rows += take
            if self._filled == self.layout.inner_rows:
                self._flush()

    def finish(self) -> FileEntry:
        """Pad the last chunk with absent rows, write the index, sync and close."""
        if self._filled:
            self._chunk[self._filled :] = self.layout.fill
            self._flush()
        self._write(self.layout.index(self.n_rows))
        self._syncing.result()  # raises what the disk refused
        os.fsync(self._fd)
        self.close()
        return FileEntry(self._n_bytes, self._hasher.hexdigest())

    def close(self) -> None:
        """Close the file; finish() has done so already."""
        if self._fd >= 0:
            wait([self._syncing])
            os.close(self._fd)
            self._fd = -1

    def _flush(self) -> None:
        if self._on_chunk is not None:
            self._on_chunk(self._chunk[: self._filled])
        self._write(self._chunk.view(np.uint8).reshape(-1).data)
        self._filled = 0

    def _write(self, data: bytes | memoryview) -> None:
        files.write_all(self._fd, data)
        self._hasher.update(data)
        self._n_bytes += len(data)
        self._unsynced += len(data)
        if self._unsynced >= SYNC_BYTES and self._syncing.done():
            self._syncing.result()
            self._syncing, self._unsynced = self._syncer.submit(os.fsync, self._fd), 0


class HookStream:
    """Activations of one hook point with their norms and moments."""

    def __init__(
        self, hook: str, dtype: str, values: ArrayLayout, norms: ArrayLayout, folder: Path, syncer: Executor
    ) -> None:
        self.hook, self.dtype = hook, dtype
        self.moments: Moments | None = None
        self.norms = ArrayStream(norms, folder / f"norms.{hook}", syncer)
        self.values = ArrayStream(values, folder / f"activations.{hook}", syncer, on_chunk=self._measure)

    def append(self, rows: Rows, first_row: int) -> None:
        """Add rows; `first_row` is the row id of the first one."""
        source = rows.activations[self.hook]

        def refuse(i: int) -> None:
            stored = source[i].astype(self.values.layout.storage.numpy)
            at = self.values.layout.storage.first_non_finite(stored)
            raise BadActivationError(
                self.hook, int(rows.doc_id[i]), first_row + i, float(source[i][at or 0]), self.dtype
            )

        with np.errstate(over="ignore", invalid="ignore"):
            self.values.append(source, refuse)

    def _measure(self, chunk_ND: Array) -> None:
        moments, norms_N = block_moments(chunk_ND)
        self.moments = moments if self.moments is None else self.moments.merge(moments)
        self.norms.append(norms_N)


class OpenShard:
    """A shard that is being written, in a folder of temporary files."""

    def __init__(self, layout: CacheLayout, dtype: str, index: int, folder: Path) -> None:
        self.layout, self.index, self.folder = layout, index, folder
        self.n_rows = 0
        self.first_window = self.last_window = -1
        folder.mkdir()
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="cache-sync")
        self._hooks = [
            HookStream(name, dtype, values, layout.norms[name], folder, self._syncer)
            for name, values in layout.activations.items()
        ]
        self._columns = {
            name: ArrayStream(array, folder / f"rows.{name}", self._syncer) for name, array in layout.columns.items()
        }
        self.documents = DocumentFile(folder / "documents")
        self._rows_per_shard = layout.columns["flags"].rows_per_shard

    @property
    def rows_left(self) -> int:
        """Rows that still fit."""
        return self._rows_per_shard - self.n_rows

    def append(self, rows: Rows, documents: list[DocumentRow]) -> None:
        """Add rows that fit, of whole windows."""
        first_row = self.index * self._rows_per_shard + self.n_rows
        for hook in self._hooks:
            hook.append(rows, first_row)
        for name in COLUMNS:
            self._columns[name].append(getattr(rows, name))
        self.documents.append(documents)
        if self.n_rows == 0:
            self.first_window = int(rows.window[0])
        self.last_window = int(rows.window[-1])
        self.n_rows += rows.n_rows

    def finish(self) -> tuple[dict[str, Path], dict[str, FileEntry], dict[str, Moments]]:
        """Complete and sync the files: path in the cache -> temporary file, -> entry; hook point -> moments."""
        streams = [
            *(hook.values for hook in self._hooks),  # before the norms: the last chunk's norms come from here
            *(hook.norms for hook in self._hooks),
            *self._columns.values(),
        ]
        temporary = {stream.layout.shard_path(self.index): stream.path for stream in streams}
        entries = {stream.layout.shard_path(self.index): stream.finish() for stream in streams}
        temporary[documents_path(self.index)] = self.documents.path
        entries[documents_path(self.index)] = self.documents.finish()
        moments = {hook.hook: hook.moments for hook in self._hooks if hook.moments is not None}
        return temporary, entries, moments

    def discard(self) -> None:
        """Close and remove the temporary files."""
        for stream in (*(h.values for h in self._hooks), *(h.norms for h in self._hooks), *self._columns.values()):
            stream.close()
        self._syncer.shutdown()
        self.documents.close()
        shutil.rmtree(self.folder, ignore_errors=True)
