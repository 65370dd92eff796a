"""The arrays of the open shard: rows streamed into temporary files, one inner chunk per array in memory.

Shapes: N rows, D = d_in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sae_granary.cache.errors import BadActivationError
from sae_granary.cache.format.layout import ArrayLayout, CacheLayout
from sae_granary.cache.format.manifest import FileEntry
from sae_granary.cache.format.stats import Moments, block_sums, moments_of
from sae_granary.cache.format.storage import Array, wider_than
from sae_granary.cache.write.calibrate import error_sums
from sae_granary.cache.write.chunk_file import ChunkFile, page_aligned
from sae_granary.common.rows import BlockSums, Rows


@dataclass(frozen=True)
class Place:
    """Where the files of the open shard are, and how they are written."""

    folder: Path
    syncer: Executor
    direct: bool
    workers: Executor | None = None


# Sees the stored rows of every chunk once; the first of them in what is appended, if all are of that; and whether they
# stay in memory until `append` returns.
OnChunk = Callable[[Array, int | None, bool], None]


class ArrayStream:
    """One array of the open shard: rows collect in an inner chunk, full ones go to the file.

    Whole chunks of the stored type go there from the caller's memory.
    """

    def __init__(self, layout: ArrayLayout, place: Place, name: str, on_chunk: OnChunk | None = None) -> None:
        self.layout, self.path = layout, place.folder / name
        self.n_rows = 0
        self._on_chunk = on_chunk
        self._direct = place.direct
        self._chunk, self.filled = page_aligned(layout.block()) if place.direct else layout.block(), 0
        self._file = ChunkFile(self.path, place.syncer, direct=place.direct, workers=place.workers)

    @property
    def room(self) -> int:
        """Rows that the open chunk still takes."""
        return self.layout.inner_rows - self.filled

    def append(self, values: Array, check: Callable[[int], None] | None = None) -> None:
        """Add rows, cast to the stored type.

        `check(i)` is called when row i came out as NaN or Inf, but for whole chunks, which `on_chunk` sees at once.
        """
        done, size = 0, self.layout.inner_rows
        as_stored = not self._direct and values.dtype == self.layout.storage.numpy and values.flags.c_contiguous
        try:
            while done < len(values):
                take = min(len(values) - done, self.room)
                if take == size and as_stored:
                    self._put(values[done : done + size], done)
                else:
                    self._collect(values[done : done + take], done, check)
                done += take
                self.n_rows += take
        finally:
            self._file.settle()

    def _collect(self, values: Array, first: int, check: Callable[[int], None] | None) -> None:
        """Copy rows into the open chunk."""
        if not self.filled:
            self._file.settle()  # the chunk before it is written from the same memory
        room, storage = self._chunk[self.filled : self.filled + len(values)], self.layout.storage
        storage.cast(values, room)
        whole = len(values) == self.layout.inner_rows
        if check is not None and not whole and (bad := storage.first_non_finite(room)) is not None:
            check(first + bad // (self.layout.width or 1))
        self.filled += len(values)
        if not self.room:
            self.filled = 0
            self._put(self._chunk, first if whole else None)

    def end(self) -> None:
        """Pad the last chunk with absent rows and write the index."""
        if self.filled:
            self._chunk[self.filled :] = self.layout.storage.fill
            self._put(self._chunk, None, self.filled)
            self.filled = 0
        self._file.write(self.layout.index(self.n_rows))
        self._file.settle()

    def finish(self) -> FileEntry:
        """Sync and close; after `end`."""
        return self._file.finish()

    def close(self) -> None:
        """Close the file; finish() has done so already."""
        self._file.close()

    def _put(self, chunk: Array, first: int | None, n_rows: int | None = None) -> None:
        if self._on_chunk is not None:
            self._on_chunk(chunk[:n_rows], first, chunk is not self._chunk)
        self._file.write(chunk.view(np.uint8).reshape(-1).data)


class HookStream:
    """Activations of one hook point with their norms and moments."""

    def __init__(self, layout: CacheLayout, hook: str, place: Place) -> None:
        self.hook = hook
        self.moments: Moments | None = None
        self.scales: ArrayStream | None = None  # of dtypes with a scale per row
        self._workers = place.workers
        self._rows: Rows  # those that are being appended, from row `_first_row` on
        self._first_row = 0
        self._given: Mapping[int, BlockSums] = {}
        self._sums: list[tuple[int, Future[BlockSums]]] = []  # of blocks of what is appended, by their first row
        self.norms = ArrayStream(layout.norms[hook], place, f"norms.{hook}")
        self.values = ArrayStream(layout.activations[hook], place, f"activations.{hook}", self._measure)

    def append(self, rows: Rows, first_row: int) -> None:
        """Add rows; `first_row` is the row id of the first one."""
        self._rows, self._first_row = rows, first_row
        self._given = rows.sums.get(self.hook, {})
        try:
            self.values.append(rows.activations[self.hook], self._refuse)
        finally:
            wait([sums for _, sums in self._sums])  # the rows are not ours after this
        for first, sums in self._sums:
            self._add(sums.result(), first)
        self._sums = []

    def _refuse(self, i: int) -> None:
        """Raise BadActivationError for the value that row i cannot be stored for."""
        storage, row, doc_id = self.values.layout.storage, self._rows.activations[self.hook][i], self._rows.doc_id[i]
        value = float(row[storage.misfit(row)])
        raise BadActivationError(self.hook, int(doc_id), self._first_row + i, value, storage.name, wider_than(storage))

    def _measure(self, chunk_ND: Array, first: int | None, lasts: bool) -> None:
        given = None if first is None else self._given.get(first)
        if given is not None and len(given.square_N) != len(chunk_ND):
            given = None
        if self._workers is None or not lasts or first is None:
            self._add(given or self._sums_of(chunk_ND), first)
            return
        if given is None:
            self._sums.append((first, self._workers.submit(self._sums_of, chunk_ND)))
        else:
            self._sums.append((first, done := Future[BlockSums]()))
            done.set_result(given)

    def _sums_of(self, chunk_ND: Array) -> BlockSums:
        return block_sums(chunk_ND)

    def _add(self, sums: BlockSums, first: int | None) -> None:
        if first is not None and not np.isfinite(sums.square_D).all():
            self._refuse_block(first, len(sums.square_N))
        moments, norms_N = moments_of(sums)
        self.moments = moments if self.moments is None else self.moments.merge(moments)
        self.norms.append(norms_N)

    def _refuse_block(self, first: int, n_rows: int) -> None:
        """Refuse the first row of a block that cannot be stored."""
        storage, values_ND = self.values.layout.storage, self._rows.activations[self.hook][first : first + n_rows]
        stored_ND = np.empty(values_ND.shape, storage.numpy)
        if (bad := storage.store(values_ND, stored_ND)) is not None:
            self._refuse(first + bad // values_ND.shape[1])


class CodedHookStream(HookStream):
    """Activations of one hook point as codes with a scale per row; moments and norms are those of the decoded rows."""

    def __init__(self, layout: CacheLayout, hook: str, place: Place) -> None:
        super().__init__(layout, hook, place)
        assert layout.affines is not None
        values, scales = layout.activations[hook], layout.scales[hook]
        self._workers = None  # a chunk is measured while its exact rows are at hand
        self.scales = ArrayStream(scales, place, f"scales.{hook}")
        self._affine = layout.affines[hook]
        self._exact_ND = np.empty(values.shape(values.inner_rows), np.float32)  # of the open chunk, for its error
        self._scales_N = np.empty(values.inner_rows, scales.storage.numpy)

    def append(self, rows: Rows, first_row: int) -> None:
        """Add rows; `first_row` is the row id of the first one."""
        self._rows, self._first_row, self._given = rows, first_row, {}
        source_ND, done = rows.activations[self.hook], 0
        assert self.scales is not None
        while done < len(source_ND):
            place = slice(self.values.filled, self.values.filled + min(len(source_ND) - done, self.values.room))
            exact_ND, scales_N = self._exact_ND[place], self._scales_N[place]
            exact_ND[...] = source_ND[done : done + len(exact_ND)]
            codes_ND = np.empty(exact_ND.shape, self.values.layout.storage.numpy)
            misfit = self._affine.encode(exact_ND, codes_ND, scales_N)
            if misfit is not None:
                self._refuse(done + misfit)
            self.scales.append(scales_N)
            self.values.append(codes_ND)
            done += len(exact_ND)

    def _sums_of(self, chunk_ND: Array) -> BlockSums:
        n_rows = len(chunk_ND)
        stored_ND = self._affine.decode(chunk_ND, self._scales_N[:n_rows])
        return replace(block_sums(stored_ND), error_D=error_sums(stored_ND, self._exact_ND[:n_rows]))
