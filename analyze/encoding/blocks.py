"""Codes in blocks of rows, from any source: codes on disk, texts being encoded, documents.

Shapes: N rows of a block, nnz entries, F = d_sae.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_granary.analyze.encoding.codes import StoredCodes, check_latents
from sae_granary.common.rows import FLAG_SPECIAL

BLOCK_ROWS = 2**15
BLOCK_ENTRIES = 2**20  # a block has fewer rows where they hold many entries: dense codes


@dataclass(frozen=True, eq=False)
class CodeBlock:
    """Some rows in CSR, with each row's document."""

    counts: NDArray[np.int64]  # (N,) entries of each row
    indices: NDArray[np.int32]  # (nnz,) latents, ascending within a row
    values: NDArray[np.float32]  # (nnz,)
    doc_ids: NDArray[np.int64]  # (N,)
    special: NDArray[np.bool_]  # (N,) rows of special tokens


def stored_blocks(codes: StoredCodes, doc_ids: Any, flags: Any, *, by_document: bool = False) -> Iterator[CodeBlock]:
    """The rows of codes on disk; `doc_ids` and `flags` are columns (N,) of the cache, of which slices are read.

    With `by_document` documents ascend, also in a cache whose rows are not in the order of their documents. Only such a
    cache takes memory for all rows, 16 bytes each. Raises DamagedCodesError for a latent that the SAE does not have.
    """
    if by_document and not is_ascending(doc_ids):
        order = np.argsort(doc_ids[:], kind="stable")
        for start in range(0, len(codes), BLOCK_ROWS):
            yield _gather(codes, doc_ids, flags, order[start : start + BLOCK_ROWS])
        return
    start = 0
    while start < len(codes):
        offsets = codes.indptr[start : start + BLOCK_ROWS + 1]
        n_rows = max(1, int(np.searchsorted(offsets, offsets[0] + BLOCK_ENTRIES, side="right")) - 1)
        part, rows = slice(int(offsets[0]), int(offsets[n_rows])), slice(start, start + n_rows)
        counts, special = np.diff(offsets[: n_rows + 1]), flags[rows] & FLAG_SPECIAL != 0
        check_latents(codes, codes.indices[part])
        yield CodeBlock(counts, codes.indices[part], codes.values[part], doc_ids[rows], special)
        start += n_rows


def is_ascending(column: Any) -> bool:
    """Whether a column is non-decreasing; read in slices."""
    starts = range(0, len(column), BLOCK_ROWS)
    return all((np.diff(column[start : start + BLOCK_ROWS + 1]) >= 0).all() for start in starts)


def _gather(codes: StoredCodes, doc_ids: Any, flags: Any, rows: NDArray[np.int64]) -> CodeBlock:
    """Rows in any order."""
    first, counts = codes.indptr[rows], codes.indptr[rows + 1] - codes.indptr[rows]
    ends = np.cumsum(counts)
    entries = np.repeat(first - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)
    special = flags[rows] & FLAG_SPECIAL != 0
    check_latents(codes, codes.indices[entries])
    return CodeBlock(counts, codes.indices[entries], codes.values[entries], doc_ids[rows], special)
