"""The open shard: rows streamed into temporary files, statistics on the way, one inner chunk per array in memory.

Every sum runs over inner chunks counted from the start of the shard, so that the result does not depend on how many
rows come per call. With several threads hook points, and the chunks of each, are worked on at the same time; the bytes
are the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from sae_granary.cache.format.documents import DocumentFile
from sae_granary.cache.format.layout import COLUMNS, CacheLayout, documents_path
from sae_granary.cache.format.manifest import ShardRecord
from sae_granary.cache.format.spec import Cursor
from sae_granary.cache.write.chunk_file import SYNCED_AT_ONCE
from sae_granary.cache.write.streams import ArrayStream, CodedHookStream, HookStream, Place
from sae_granary.common.rows import DocumentRow, Rows


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
        n_threads: int = 1,
    ) -> None:
        self.layout, self.index, self.folder = layout, index, folder
        self.n_rows = 0
        self.first_window = self.last_window = -1
        folder.mkdir()
        self._syncer = ThreadPoolExecutor(SYNCED_AT_ONCE, thread_name_prefix="cache-sync")
        self._workers = ThreadPoolExecutor(n_threads, "cache-write") if n_threads > 1 else None
        n_hooks = min(n_threads, len(layout.activations))
        self._by_hook = ThreadPoolExecutor(n_hooks, "cache-hook") if n_hooks > 1 else None  # they wait for workers
        place = Place(folder, self._syncer, direct, self._workers)
        stream = HookStream if layout.affines is None else CodedHookStream
        self._hooks = [stream(layout, hook, place) for hook in layout.activations]
        self._columns = {name: ArrayStream(array, place, f"rows.{name}") for name, array in layout.columns.items()}
        self.documents = DocumentFile(folder / "documents", kept_columns)
        self._rows_per_shard = layout.columns["flags"].rows_per_shard

    def append(self, rows: Rows, documents: list[DocumentRow]) -> None:
        """Add rows that fit, of whole windows."""
        first_row = self.index * self._rows_per_shard + self.n_rows
        if self._by_hook is None:
            for hook in self._hooks:
                hook.append(rows, first_row)
        else:
            done = [self._by_hook.submit(hook.append, rows, first_row) for hook in self._hooks]
            wait(done)
            for each in done:
                each.result()
        for name in COLUMNS:
            self._columns[name].append(getattr(rows, name))
        self.documents.append(documents)
        if self.n_rows == 0:
            self.first_window = int(rows.window[0])
        self.last_window = int(rows.window[-1])
        self.n_rows += rows.n_rows

    @property
    def _streams(self) -> list[ArrayStream]:
        scales = [hook.scales for hook in self._hooks if hook.scales is not None]
        values = [hook.values for hook in self._hooks]  # before the norms: those of the last chunk come from here
        return [*values, *scales, *(hook.norms for hook in self._hooks), *self._columns.values()]

    def finish(self, cursor: Cursor, block: int | None = None) -> tuple[dict[str, Path], ShardRecord]:
        """Complete and sync the files: path in the cache -> temporary file, and the record to commit them with."""
        streams = {stream.layout.shard_path(self.index): stream for stream in self._streams}
        for stream in streams.values():
            stream.end()
        written: dict[str, ArrayStream | DocumentFile] = {**streams, documents_path(self.index): self.documents}
        temporary = {path: file.path for path, file in written.items()}
        synced = {path: self._syncer.submit(file.finish) for path, file in written.items()}
        wait(synced.values())
        entries = {path: entry.result() for path, entry in synced.items()}
        record = ShardRecord(
            shard=self.index,
            n_rows=self.n_rows,
            first_window=self.first_window,
            last_window=self.last_window,
            documents=self.documents.range,
            cursor=cursor,
            files=entries,
            statistics={hook.hook: hook.moments for hook in self._hooks if hook.moments is not None},
            affines=self.layout.affines if self.index == 0 else None,
            block=block,
        )
        return temporary, record

    def discard(self) -> None:
        """Close and remove the temporary files."""
        for stream in self._streams:
            stream.close()
        for threads in (self._by_hook, self._workers, self._syncer):
            if threads is not None:
                threads.shutdown()
        self.documents.close()
        shutil.rmtree(self.folder, ignore_errors=True)
