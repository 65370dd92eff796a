"""Codes in files for other programs: npz (as `scipy.sparse.load_npz` reads it) and Parquet."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_granary.analyze.encoding.blocks import CodeBlock
from sae_granary.analyze.encoding.codes import DTYPES, StoredCodes
from sae_granary.analyze.encoding.csr_files import npy_header
from sae_granary.common.files import TEMP_PREFIX, sync_file, sync_folder

CHUNK = 2**20  # entries copied at once
GROUP_ROWS, GROUP_ENTRIES = 2**15, 2**22  # a row group of Parquet has at least as many rows, or entries
FIXED_COLUMNS = ("row", "special", "doc_id", "latents", "activations", "source")

# ids of documents (n,), ascending with repetitions -> columns of a table, n entries each
DocumentColumns = Callable[[NDArray[np.int64]], Mapping[str, Any]]


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; its file replaces `path` when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMP_PREFIX}{path.name}")
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_npz(out: Path, codes: StoredCodes, doc_ids: Any) -> None:
    """A file that `scipy.sparse.load_npz` reads as a CSR matrix, with `doc_ids` beside; atomically, in pieces.

    `doc_ids` (N,) is an array or a column of a cache.
    """
    small = {"format": np.array(b"csr"), "shape": np.array(codes.shape, np.int64)}
    large = {"indptr": codes.indptr, "indices": codes.indices, "data": codes.values, "doc_ids": doc_ids}
    dtypes = DTYPES | {"data": DTYPES["values"]}
    with new_file(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, value in small.items():
            with archive.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array(stream, value, allow_pickle=False)
        for name, array in large.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                stream.write(npy_header(dtypes[name], len(array)))
                for start in range(0, len(array), CHUNK):
                    stream.write(array[start : start + CHUNK].astype(dtypes[name], copy=False).tobytes())


def write_parquet(out: Path, blocks: Iterable[CodeBlock], columns_of: DocumentColumns, *, documents: bool) -> int:
    """One row per row of the codes, or per document: doc_id, latents, activations, and columns of its document.

    A row of the codes has its number `row` too, and whether it is a `special` token.

    Returns the number of rows. Written in row groups, atomically.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer, n_rows = None, 0
    with new_file(out) as temporary:
        try:
            for group in _groups(blocks):
                table = pa.table(_columns(group, columns_of, None if documents else n_rows))
                writer = pq.ParquetWriter(temporary, table.schema) if writer is None else writer
                writer.write_table(table.cast(writer.schema), row_group_size=table.num_rows or None)
                n_rows += table.num_rows
        finally:
            if writer is not None:
                writer.close()
    return n_rows


def _columns(block: CodeBlock, columns_of: DocumentColumns, first_row: int | None) -> dict[str, Any]:
    import pyarrow as pa

    ends = np.concatenate([[0], np.cumsum(block.counts)]).astype(np.int32)
    rows: dict[str, Any] = {}
    if first_row is not None:
        rows = {"row": np.arange(first_row, first_row + len(block.counts)), "special": block.special}
    return {
        **rows,
        "doc_id": block.doc_ids,
        "latents": pa.ListArray.from_arrays(ends, block.indices),
        "activations": pa.ListArray.from_arrays(ends, block.values),
        **columns_of(block.doc_ids),
    }


def _groups(blocks: Iterable[CodeBlock]) -> Iterator[CodeBlock]:
    """Join blocks to at least GROUP_ROWS rows or GROUP_ENTRIES entries; one empty block if there are none."""
    waiting: list[CodeBlock] = []
    written = False
    for block in blocks:
        waiting.append(block)
        n_rows, n_entries = (sum(len(getattr(b, name)) for b in waiting) for name in ("counts", "indices"))
        if n_rows >= GROUP_ROWS or n_entries >= GROUP_ENTRIES:
            yield _joined(waiting)
            waiting, written = [], True
    if waiting or not written:
        yield _joined(waiting)


def _joined(blocks: list[CodeBlock]) -> CodeBlock:
    kinds = {"counts": np.int64, "indices": np.int32, "values": np.float32, "doc_ids": np.int64, "special": np.bool_}
    parts = {name: [getattr(block, name) for block in blocks] for name in kinds}
    return CodeBlock(**{name: np.concatenate([np.zeros(0, kind), *parts[name]]) for name, kind in kinds.items()})
