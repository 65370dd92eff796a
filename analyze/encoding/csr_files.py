"""Writing the files of codes: growing arrays, and the record of how far they are complete."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from sae_granary.analyze.encoding.blocks import CodeBlock
from sae_granary.analyze.encoding.codes import ARRAYS, DTYPES, HEADER_BYTES, RECORD, CodesRecord, array_path, file_bytes
from sae_granary.common.files import hash_files, new_folder, sync_folder
from sae_granary.common.signed import write_signed


class CSRFiles:
    """Open files of codes, positioned by their record. A context manager; without `finish` they stay unfinished."""

    def __init__(self, out: Path, record: CodesRecord, names: Iterable[str] = tuple(ARRAYS)) -> None:
        self._out, self.record = out, record
        self._stack = ExitStack()
        self._streams = {name: self._stack.enter_context(_open_at(out, record, name)) for name in names}
        if not record.n_rows:
            self._streams["indptr"].write(np.zeros(1, ARRAYS["indptr"]).tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def append(self, counts: NDArray[np.int64], **arrays: NDArray[Any]) -> None:
        """Append rows with these numbers of entries; `arrays` belong to the files beside indptr."""
        ends = self.record.nnz + np.cumsum(counts)
        for name, part in {"indptr": ends, **arrays}.items():
            self._streams[name].write(part.astype(DTYPES[name], copy=False).tobytes())
        n_rows, nnz = self.record.n_rows + len(counts), self.record.nnz + len(arrays["values"])
        self.record = replace(self.record, n_rows=n_rows, nnz=nnz)

    def commit(self) -> None:
        """Make the rows so far durable; encoding can continue after them."""
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        sync_folder(self._out)
        write_signed(self._out / RECORD, self.record.to_json())

    def finish(self) -> None:
        """Write the headers, and the record of complete codes with checksums of the files, which are read once."""
        for name, stream in self._streams.items():
            stream.seek(0)
            stream.write(npy_header(DTYPES[name], self.record.length(name)))
            stream.flush()
        hashes = {name: hash_files([array_path(self._out, name)]) for name in self._streams}
        self.record = replace(self.record, complete=True, arrays_xxh3=hashes)
        self.commit()


def write_blocks(out: Path, blocks: Iterable[CodeBlock], d_sae: int, identity: Mapping[str, Any], device: str) -> None:
    """Write blocks and their rows' documents into a new folder, atomically. `identity` is read after the last block."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out) as temporary:
        record = CodesRecord(identity, d_sae, 0, 0, False, 1, device)
        with CSRFiles(temporary, record, DTYPES) as files:
            for block in blocks:
                files.append(block.counts, indices=block.indices, values=block.values, doc_ids=block.doc_ids)
            files.finish()


def _open_at(out: Path, record: CodesRecord, name: str) -> BinaryIO:
    """Open the file of an array for appending, cut to the length in its record."""
    path = array_path(out, name)
    stream = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 -- closed by the caller
    stream.truncate(HEADER_BYTES if not record.n_rows else file_bytes(record, name))
    stream.seek(0, os.SEEK_END)
    return stream


def npy_header(dtype: np.dtype[Any], length: int) -> bytes:
    """Header of a one-dimensional .npy file (format 1.0), always 128 bytes."""
    text = repr({"descr": dtype.str, "fortran_order": False, "shape": (length,)})
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", HEADER_BYTES - 10) + text.ljust(HEADER_BYTES - 11).encode() + b"\n"
