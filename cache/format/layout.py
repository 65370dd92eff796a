"""Location of every byte of a cache: pure functions of its description. See FORMAT.md.

All arrays share one grid of shards; a shard file holds the rows from byte 0, then Zarr's sharding index.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
import numpy as np

from sae_granary.cache.format.affine import FORMULA, Affine
from sae_granary.cache.format.spec import DEFAULT_INNER_CHUNK_BYTES
from sae_granary.cache.format.storage import STORAGE, Array, Storage
from sae_granary.common.rows import FLAG_ABSENT, HookPoint

MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.json"
COMMITS = "commits"
DOCUMENTS = "documents"
BLOCKS = "blocks"  # of a harvest by several processes, until it finishes: a cache per block, leases, outcomes
ADDED = "added"  # caches of hook points that were added to the same rows
TEMPORARY = ".tmp"  # files on their way into place; removed when a harvest finishes
LOCK = ".lock"
ABOUT = "about.json"  # when, how and on what machine it was made; never read with the data, never compared
LOG = "harvest.log"  # the harvest's own; nothing here reads or writes it
GROUPS = ("activations", "rows", "norms")  # of every cache
SCALES, AFFINE = "scales", "affine"  # groups of dtypes with a scale per row

COLUMNS: Mapping[str, Storage] = {
    "token_id": Storage("int32", "<i4", fill=-1),
    "doc_id": Storage("int64", "<i8", fill=-1),
    "window": Storage("uint64", "<u8", fill=2**64 - 1),
    "position": Storage("int32", "<i4", fill=-1),
    "doc_position": Storage("int32", "<i4", fill=-1),
    "flags": Storage("uint8", "u1", fill=FLAG_ABSENT),
}
NORMS = STORAGE["float32"]

VECTORS = ("step", "offset")  # of an affine map
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
_ABSENT_CHUNK = 2**64 - 1  # offset and length of an inner chunk that is not there
_CRC_BYTES = 4
DEFAULT_SHARD_BYTES = 256 << 20


@dataclass(frozen=True)
class ArrayLayout:
    """One Zarr array: (n_shards * rows_per_shard, width), or one-dimensional if width is None."""

    path: str  # in the cache, e.g. "activations/layer_6"
    storage: Storage
    width: int | None
    rows_per_shard: int
    inner_rows: int  # rows of an inner chunk; divides rows_per_shard
    attributes: Mapping[str, str] = field(default_factory=dict)  # for people who read it with another library

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.storage.item_bytes * (self.width or 1)

    @property
    def n_inner(self) -> int:
        """Inner chunks of a whole shard."""
        return self.rows_per_shard // self.inner_rows

    def shape(self, n_rows: int) -> tuple[int, ...]:
        """Shape of n rows of this array."""
        return (n_rows,) if self.width is None else (n_rows, self.width)

    def padded_rows(self, n_rows: int) -> int:
        """Rows in the file of a shard that holds n: whole inner chunks."""
        return math.ceil(n_rows / self.inner_rows) * self.inner_rows

    def shard_bytes(self, n_rows: int) -> int:
        """Exact size of the file of a shard that holds n rows: these, the sharding index and its checksum."""
        return self.padded_rows(n_rows) * self.row_bytes + 16 * self.n_inner + _CRC_BYTES

    def shard_path(self, shard: int) -> str:
        """Path of a shard file in the cache."""
        return f"{self.path}/c.{shard}" + ("" if self.width is None else ".0")

    def block(self) -> Array:
        """An inner chunk of absent rows."""
        return np.full(self.shape(self.inner_rows), self.storage.fill, dtype=self.storage.numpy)

    def index(self, n_rows: int) -> bytes:
        """The sharding index of a shard of n rows: (offset, length) per inner chunk, little-endian, then CRC32C."""
        chunk_bytes = self.inner_rows * self.row_bytes
        entries = np.full((self.n_inner, 2), _ABSENT_CHUNK, dtype="<u8")
        present = self.padded_rows(n_rows) // self.inner_rows
        entries[:present, 0] = np.arange(present, dtype="<u8") * chunk_bytes
        entries[:present, 1] = chunk_bytes
        data = entries.tobytes()
        return data + int(google_crc32c.value(data)).to_bytes(_CRC_BYTES, "little")

    def zarr_json(self, n_shards: int) -> dict[str, Any]:
        """Zarr v3 metadata of the array when there are n shards."""
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape(n_shards * self.rows_per_shard)),
            "data_type": self.storage.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.shape(self.rows_per_shard))}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": self.storage.fill if isinstance(self.storage.fill, int) else "NaN",
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": list(self.shape(self.inner_rows)),
                        "codecs": [LITTLE],
                        "index_codecs": [LITTLE, {"name": "crc32c"}],
                        "index_location": "end",
                    },
                }
            ],
            "attributes": dict(self.attributes),
            "dimension_names": ["row"] if self.width is None else ["row", "d_in"],
            "storage_transformers": [],
        }


@dataclass(frozen=True)
class CacheLayout:
    """All arrays of a cache."""

    activations: Mapping[str, ArrayLayout]  # by hook point
    norms: Mapping[str, ArrayLayout]  # by hook point
    columns: Mapping[str, ArrayLayout]  # by column
    scales: Mapping[str, ArrayLayout]  # by hook point; empty for dtypes without
    affines: Mapping[str, Affine] | None  # by hook point; of dtypes with scales, once they are fitted
    version: int  # of the format

    @property
    def is_fitted(self) -> bool:
        """Whether rows can be encoded: dtypes with scales need steps and offsets first."""
        return not self.scales or self.affines is not None

    @property
    def groups(self) -> tuple[str, ...]:
        """Folders above those of the arrays."""
        if not self.scales:
            return GROUPS
        return (*GROUPS, SCALES, AFFINE, *(f"{AFFINE}/{hook}" for hook in self.scales))

    @property
    def folders(self) -> tuple[str, ...]:
        """Every folder with Zarr metadata below the cache's own."""
        vectors = [f"{AFFINE}/{hook}/{name}" for hook in self.scales for name in VECTORS]
        return (*self.groups, *(array.path for array in self.arrays), *vectors)

    @property
    def arrays(self) -> tuple[ArrayLayout, ...]:
        """Every array, in the order in which they are written."""
        return (*self.hook_arrays, *self.columns.values())

    @property
    def hook_arrays(self) -> tuple[ArrayLayout, ...]:
        """The arrays that hook points have of their own; the columns are of the rows."""
        return (*self.activations.values(), *self.scales.values(), *self.norms.values())

    def late(self, hook: str) -> tuple[ArrayLayout, ...]:
        """The arrays of a hook point that are fetched shard by shard where a cache is read while it is fetched."""
        return (self.activations[hook], *([self.scales[hook]] if hook in self.scales else []))

    def shard_files(self, shard: int, n_rows: int) -> dict[str, int]:
        """Path -> exact size of the Zarr files of a shard."""
        return {array.shard_path(shard): array.shard_bytes(n_rows) for array in self.arrays}

    def bytes_of(self, n_rows: int) -> int:
        """About the bytes that n rows take, documents apart: what a plan shows before anything is written."""
        rows_per_shard = self.columns["flags"].rows_per_shard
        whole, rest = divmod(n_rows, rows_per_shard)
        return sum(
            array.shard_bytes(rows_per_shard) * whole + (array.shard_bytes(rest) if rest else 0)
            for array in self.arrays
        )


def cache_layout(
    hook_points: Sequence[HookPoint],
    dtype: str,
    rows_per_shard: int,
    inner_chunk_bytes: int = DEFAULT_INNER_CHUNK_BYTES,
    affines: Mapping[str, Affine] | None = None,
) -> CacheLayout:
    """The arrays of a cache of these hook points."""
    storage = STORAGE[dtype]

    def array(path: str, storage: Storage, width: int | None = None, **attributes: str) -> ArrayLayout:
        inner = inner_rows(rows_per_shard, storage.item_bytes * (width or 1), inner_chunk_bytes)
        return ArrayLayout(path, storage, width, rows_per_shard, inner, attributes)

    def formula(hook: str) -> dict[str, str]:
        """How activations are decoded, for readers that do not know this format."""
        vectors = {name: f"{AFFINE}/{hook}/{name}" for name in VECTORS}
        return {"formula": FORMULA, "scale": f"{SCALES}/{hook}", **vectors} if storage.scale else {}

    return CacheLayout(
        activations={h.name: array(f"activations/{h.name}", storage, h.d_in, **formula(h.name)) for h in hook_points},
        norms={h.name: array(f"norms/{h.name}", NORMS) for h in hook_points},
        columns={name: array(f"rows/{name}", column) for name, column in COLUMNS.items()},
        scales={h.name: array(f"{SCALES}/{h.name}", storage.scale) for h in hook_points if storage.scale},
        affines=affines,
        version=storage.version,
    )


def inner_rows(rows_per_shard: int, row_bytes: int, inner_chunk_bytes: int) -> int:
    """Rows of an inner chunk: the divisor of the shard whose size is nearest to the wanted one, at most 4 times it."""
    wanted = max(1.0, inner_chunk_bytes / row_bytes)
    small = [d for d in range(1, math.isqrt(rows_per_shard) + 1) if rows_per_shard % d == 0]
    divisors = {*small, *(rows_per_shard // d for d in small)}
    return min((d for d in divisors if d <= 4 * wanted), key=lambda d: (abs(math.log(d / wanted)), d))


def default_rows_per_shard(d_in: int, dtype: str, shard_bytes: int = DEFAULT_SHARD_BYTES) -> int:
    """The largest power of two of rows whose activations fit `shard_bytes` at one hook point."""
    rows = max(1, shard_bytes // (d_in * STORAGE[dtype].item_bytes))
    return 1 << (rows.bit_length() - 1)


def commit_path(shard: int) -> str:
    """Path of a shard's commit record."""
    return f"{COMMITS}/{shard:08d}.json"


def blocks_path(n_shards: int) -> str:
    """Folder, in the cache, of blocks that follow so many shards of a complete cache."""
    return f"{BLOCKS}/after_{n_shards:08d}" if n_shards else BLOCKS


def documents_path(shard: int) -> str:
    """Path of the documents whose first row is in a shard."""
    return f"{DOCUMENTS}/{shard:08d}.parquet"
