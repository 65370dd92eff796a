"""The disk space of a cache: what it will take, told before it is written, and a clear error where the disk is full."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sae_granary.cache.errors import DiskFullError
from sae_granary.cache.format.documents import GROUP_DOCUMENTS, DocumentFile
from sae_granary.cache.format.layout import CacheLayout
from sae_granary.cache.format.zarr_json import zarr_files
from sae_granary.cache.write.spec_json import vocabulary_bytes
from sae_granary.common.files import NO_SPACE, free_bytes
from sae_granary.common.rows import DocumentRow

SAMPLE = GROUP_DOCUMENTS  # documents that are written at once: more do not tell more
STATISTICS = 2 * 8 * 4 / 3  # bytes of a record per number of a row: mean and m2 in base64
_SHARD_JSON = 4096  # of a shard, in its record and in the manifest


def planned_bytes(
    layout: CacheLayout,
    n_rows: int,
    documents: float,
    vocabulary: Sequence[str] | None = None,
    n_shards: int | None = None,
) -> int:
    """Bytes of a complete cache of so many rows; `documents` are those of its documents, all together.

    `n_shards` is for caches in blocks, of which each ends with a short shard; else shards are full.
    """
    n_shards = math.ceil(n_rows / layout.columns["flags"].rows_per_shard) if n_shards is None else n_shards
    numbers = sum(array.width or 1 for array in layout.activations.values())
    beside = (n_shards + 1) * numbers * STATISTICS + n_shards * _SHARD_JSON
    beside += sum(map(len, zarr_files(layout, n_shards).values())) + len(vocabulary_bytes(vocabulary) or b"")
    return array_bytes(layout, n_rows, n_shards) + round(documents + beside)


def array_bytes(layout: CacheLayout, n_rows: int, n_shards: int) -> int:
    """Bytes of the arrays of n rows in so many shards: a short shard of a block has a whole chunk of each column."""
    if n_shards <= math.ceil(n_rows / layout.columns["flags"].rows_per_shard):
        return layout.bytes_of(n_rows)
    return n_shards * layout.bytes_of(math.ceil(n_rows / n_shards))


def bytes_per_document(documents: Sequence[DocumentRow], kept_columns: Sequence[str] = ()) -> float:
    """Bytes that a document like these takes on disk: measured by writing them."""
    if not documents:
        return 0.0
    with tempfile.TemporaryDirectory() as folder:
        file = DocumentFile(Path(folder) / "documents", kept_columns)
        file.append(documents)
        return file.finish().n_bytes / len(documents)


@contextmanager
def no_space_is_clear(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into a DiskFullError that says how much is missing."""
    try:
        yield
    except DiskFullError:
        raise
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise DiskFullError(path, needed_bytes, free_bytes(path)) from error
