"""The open shard: rows streamed into temporary files, statistics on the way, one inner chunk per array in memory.

Every sum runs over inner chunks counted from the start of the shard, so that the result does not depend on how many
rows come per call.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from sae_granary.cache.errors import BadActivationError
from sae_granary.cache.format.documents import DocumentFile
from sae_granary.cache.format.layout import COLUMNS, ArrayLayout, CacheLayout, documents_path
from sae_granary.cache.format.manifest import FileEntry, ShardRecord
from sae_granary.cache.format.spec import Cursor
from sae_granary.cache.format.stats import Moments, block_moments
from sae_granary.cache.format.storage import Array, wider_than
from sae_granary.cache.write.chunk_file import ChunkFile, page_aligned
from sae_granary.common.rows import DocumentRow, Rows


class ArrayStream:
    """One array of the open shard: rows collect in an inner chunk, full ones go to the file."""

    def __init__(
        self,
        layout: ArrayLayout,
        path: Path,
        syncer: Executor,
        *,
        direct: bool,
        on_chunk: Callable[[Array], None] | None = None,
    ) -> None:
        self.layout, self.path = layout, path
        self.n_rows = 0
        self._on_chunk = on_chunk  # sees the stored rows of every chunk once
        self._chunk, self._filled = page_aligned(layout.block()) if direct else layout.block(), 0
        self._file = ChunkFile(path, syncer, direct=direct)

    def append(self, values: Array, check: Callable[[int], None] | None = None) -> None:
        """Add rows, cast to the stored type; `check(i)` is called when row i came out as NaN or Inf."""
        done = 0
        while done < len(values):
            take = min(len(values) - done, self.layout.inner_rows - self._filled)
            room = self._chunk[self._filled : self._filled + take]
            bad = self.layout.storage.store(values[done : done + take], room)
            if check is not None and bad is not None:
                check(done + bad // (self.layout.width or 1))
            done += take
            self._filled += take
            self.n_rows += take
            if self._filled == self.layout.inner_rows:
                self._flush()

    def finish(self) -> FileEntry:
        """Pad the last chunk with absent rows, write the index, sync and close."""
        if self._filled:
            self._chunk[self._filled :] = self.layout.storage.fill
            self._flush()
        self._file.write(self.layout.index(self.n_rows))
        return self._file.finish()

    def close(self) -> None:
        """Close the file; finish() has done so already."""
        self._file.close()

    def _flush(self) -> None:
        if self._on_chunk is not None:
            self._on_chunk(self._chunk[: self._filled])
        self._file.write(self._chunk.view(np.uint8).reshape(-1).data)
        self._filled = 0


class HookStream:
    """Activations of one hook point with their norms and moments."""

    def __init__(
        self,
        hook: str,
        values: ArrayLayout,
        norms: ArrayLayout,
        folder: Path,
        syncer: Executor,
        *,
        direct: bool,
    ) -> None:
        self.hook = hook
        self.moments: Moments | None = None
        self.norms = ArrayStream(norms, folder / f"norms.{hook}", syncer, direct=direct)
        path = folder / f"activations.{hook}"
        self.values = ArrayStream(values, path, syncer, direct=direct, on_chunk=self._measure)

    def append(self, rows: Rows, first_row: int) -> None:
        """Add rows; `first_row` is the row id of the first one."""
        source = rows.activations[self.hook]

        def refuse(i: int) -> None:
            storage = self.values.layout.storage
            at = storage.store(source[i], np.empty(len(source[i]), storage.numpy)) or 0
            value, wider = float(source[i][at]), wider_than(storage)
            raise BadActivationError(self.hook, int(rows.doc_id[i]), first_row + i, value, storage.name, wider)

        self.values.append(source, refuse)

    def _measure(self, chunk_ND: Array) -> None:
        moments, norms_N = block_moments(chunk_ND)
        self.moments = moments if self.moments is None else self.moments.merge(moments)
        self.norms.append(norms_N)


class OpenShard:
    """A shard that is being written, in a folder of temporary files."""

    def __init__(
        self,
        layout: CacheLayout,
        index: int,
        folder: Path,
        *,
        kept_columns: Sequence[str] = (),
        direct: bool = False,
    ) -> None:
        self.layout, self.index, self.folder = layout, index, folder
        self.n_rows = 0
        self.first_window = self.last_window = -1
        folder.mkdir()
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="cache-sync")
        self._hooks = [
            HookStream(name, values, layout.norms[name], folder, self._syncer, direct=direct)
            for name, values in layout.activations.items()
        ]
        self._columns = {
            name: ArrayStream(array, folder / f"rows.{name}", self._syncer, direct=direct)
            for name, array in layout.columns.items()
        }
        self.documents = DocumentFile(folder / "documents", kept_columns)
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

    def finish(self, cursor: Cursor) -> tuple[dict[str, Path], ShardRecord]:
        """Complete and sync the files: path in the cache -> temporary file, and the record to commit them with."""
        streams = [
            *(hook.values for hook in self._hooks),  # before the norms: the last chunk's norms come from here
            *(hook.norms for hook in self._hooks),
            *self._columns.values(),
        ]
        temporary = {stream.layout.shard_path(self.index): stream.path for stream in streams}
        entries = {stream.layout.shard_path(self.index): stream.finish() for stream in streams}
        temporary[documents_path(self.index)] = self.documents.path
        entries[documents_path(self.index)] = self.documents.finish()
        record = ShardRecord(
            shard=self.index,
            n_rows=self.n_rows,
            first_window=self.first_window,
            last_window=self.last_window,
            documents=self.documents.range,
            cursor=cursor,
            files=entries,
            statistics={hook.hook: hook.moments for hook in self._hooks if hook.moments is not None},
        )
        return temporary, record

    def discard(self) -> None:
        """Close and remove the temporary files."""
        for stream in (*(h.values for h in self._hooks), *(h.norms for h in self._hooks), *self._columns.values()):
            stream.close()
        self._syncer.shutdown()
        self.documents.close()
        shutil.rmtree(self.folder, ignore_errors=True)
