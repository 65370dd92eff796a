"""The arrays of the open shard: rows streamed into temporary files, one inner chunk per array in memory.

Shapes: N rows, D = d_in.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sae_granary.cache.errors import BadActivationError
from sae_granary.cache.format.affine import Affine
from sae_granary.cache.format.layout import ArrayLayout, CacheLayout
from sae_granary.cache.format.manifest import FileEntry
from sae_granary.cache.format.stats import Moments, block_moments
from sae_granary.cache.format.storage import Array, wider_than
from sae_granary.cache.write.calibrate import error_sums
from sae_granary.cache.write.chunk_file import ChunkFile, page_aligned
from sae_granary.common.rows import Rows


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
        self._chunk, self.filled = page_aligned(layout.block()) if direct else layout.block(), 0
        self._file = ChunkFile(path, syncer, direct=direct)

    @property
    def room(self) -> int:
        """Rows that the open chunk still takes."""
        return self.layout.inner_rows - self.filled

    def append(self, values: Array, check: Callable[[int], None] | None = None) -> None:
        """Add rows, cast to the stored type; `check(i)` is called when row i came out as NaN or Inf."""
        done = 0
        while done < len(values):
            take = min(len(values) - done, self.room)
            room = self._chunk[self.filled : self.filled + take]
            bad = self.layout.storage.store(values[done : done + take], room)
            if check is not None and bad is not None:
                check(done + bad // (self.layout.width or 1))
            done += take
            self.filled += take
            self.n_rows += take
            if self.filled == self.layout.inner_rows:
                self._flush()

    def finish(self) -> FileEntry:
        """Pad the last chunk with absent rows, write the index, sync and close."""
        if self.filled:
            self._chunk[self.filled :] = self.layout.storage.fill
            self._flush()
        self._file.write(self.layout.index(self.n_rows))
        return self._file.finish()

    def close(self) -> None:
        """Close the file; finish() has done so already."""
        self._file.close()

    def _flush(self) -> None:
        if self._on_chunk is not None:
            self._on_chunk(self._chunk[: self.filled])
        self._file.write(self._chunk.view(np.uint8).reshape(-1).data)
        self.filled = 0


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
        self.scales: ArrayStream | None = None  # of dtypes with a scale per row
        self.norms = ArrayStream(norms, folder / f"norms.{hook}", syncer, direct=direct)
        path = folder / f"activations.{hook}"
        self.values = ArrayStream(values, path, syncer, direct=direct, on_chunk=self._measure)

    def append(self, rows: Rows, first_row: int) -> None:
        """Add rows; `first_row` is the row id of the first one."""
        self.values.append(rows.activations[self.hook], lambda i: self._refuse(rows, i, first_row))

    def _refuse(self, rows: Rows, i: int, first_row: int) -> None:
        """Raise BadActivationError for the value that row i cannot be stored for."""
        storage, row = self.values.layout.storage, rows.activations[self.hook][i]
        at = storage.misfit(row)
        raise BadActivationError(
            self.hook, int(rows.doc_id[i]), first_row + i, float(row[at]), storage.name, wider_than(storage)
        )

    def _measure(self, chunk_ND: Array) -> None:
        self._add(*block_moments(chunk_ND))

    def _add(self, moments: Moments, norms_N: Array) -> None:
        self.moments = moments if self.moments is None else self.moments.merge(moments)
        self.norms.append(norms_N)


class CodedHookStream(HookStream):
    """Activations of one hook point as codes with a scale per row; moments and norms are those of the decoded rows."""

    def __init__(
        self,
        hook: str,
        values: ArrayLayout,
        norms: ArrayLayout,
        folder: Path,
        syncer: Executor,
        *,
        direct: bool,
        scales: ArrayLayout,
        affine: Affine,
    ) -> None:
        super().__init__(hook, values, norms, folder, syncer, direct=direct)
        self.scales = ArrayStream(scales, folder / f"scales.{hook}", syncer, direct=direct)
        self._affine = affine
        self._exact_ND = np.empty(values.shape(values.inner_rows), np.float32)  # of the open chunk, for its error
        self._scales_N = np.empty(values.inner_rows, scales.storage.numpy)

    def append(self, rows: Rows, first_row: int) -> None:
        """Add rows; `first_row` is the row id of the first one."""
        source_ND, done = rows.activations[self.hook], 0
        assert self.scales is not None
        while done < len(source_ND):
            place = slice(self.values.filled, self.values.filled + min(len(source_ND) - done, self.values.room))
            exact_ND, scales_N = self._exact_ND[place], self._scales_N[place]
            exact_ND[...] = source_ND[done : done + len(exact_ND)]
            codes_ND = np.empty(exact_ND.shape, self.values.layout.storage.numpy)
            misfit = self._affine.encode(exact_ND, codes_ND, scales_N)
            if misfit is not None:
                self._refuse(rows, done + misfit, first_row)
            self.scales.append(scales_N)
            self.values.append(codes_ND)
            done += len(exact_ND)

    def _measure(self, chunk_ND: Array) -> None:
        n_rows = len(chunk_ND)
        stored_ND = self._affine.decode(chunk_ND, self._scales_N[:n_rows])
        moments, norms_N = block_moments(stored_ND)
        self._add(replace(moments, error_D=error_sums(stored_ND, self._exact_ND[:n_rows])), norms_N)


def open_hooks(layout: CacheLayout, folder: Path, syncer: Executor, *, direct: bool) -> list[HookStream]:
    """A stream for each hook point."""
    streams = []
    for hook, values in layout.activations.items():
        place = (hook, values, layout.norms[hook], folder, syncer)
        if layout.affines is None:
            streams.append(HookStream(*place, direct=direct))
        else:
            parts: dict[str, Any] = {"scales": layout.scales[hook], "affine": layout.affines[hook]}
            streams.append(CodedHookStream(*place, direct=direct, **parts))
    return streams
