"""Codes on disk: a sparse matrix (CSR) of three .npy files beside a signed record, memory-mapped.

codes/
    indptr.npy    (N + 1,) int64    where the entries of each row start
    indices.npy   (nnz,) int32      latents, ascending within a row, each once
    values.npy    (nnz,) float32    their activations, none of them zero
    doc_ids.npy   (N,) int64        of texts, and of codes pooled per document: which document each row is of
    record.json   SAE, cache, sizes, checksums of itself and of the arrays; `complete` is set last

Shapes: N rows, in the order of the cache's rows, F = d_sae latents, nnz entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_granary.analyze.errors import DamagedCodesError, MismatchError
from sae_granary.common.files import hash_files
from sae_granary.common.signed import Fields

RECORD = "record.json"
FORMAT = 1
ARRAYS: dict[str, np.dtype[Any]] = {"indptr": np.dtype("<i8"), "indices": np.dtype("<i4"), "values": np.dtype("<f4")}
DTYPES: dict[str, np.dtype[Any]] = ARRAYS | {"doc_ids": np.dtype("<i8")}
WITH_DOC_IDS = ("texts", "pool")  # entries of an identity that say that there are doc_ids
REMEDY = "remove the folder and run `sae-analyze encode` again"
ANOTHER_OUT = "remove the folder, or give another --out"  # where it was given with --out
HEADER_BYTES = 128  # of every .npy file, so that a growing file never moves
CHUNK = 2**22  # latents checked at once


class CodesFields(Fields):
    """Fields of the record of codes."""

    damaged = DamagedCodesError


@dataclass(frozen=True)
class CodesRecord:
    """record.json: identity of the codes, and how far they are written."""

    identity: Mapping[str, Any]  # see `Source.identity`
    d_sae: int
    n_rows: int  # written so far
    nnz: int
    complete: bool
    block_rows: int  # rows encoded at once
    device: str
    arrays_xxh3: Mapping[str, str] | None = None  # of the files, by array; None: unfinished, or written before it was

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        dtypes = {name: dtype.str for name, dtype in ARRAYS.items()}
        return {"format": FORMAT, "dtypes": dtypes, **vars(self), "identity": dict(self.identity)}

    @classmethod
    def read(cls, folder: Path) -> CodesRecord:
        """The record of a folder. Raises DamagedCodesError."""
        missing = f"{folder} holds no codes; `sae-analyze encode` writes them"
        fields = CodesFields.of_file(folder / RECORD, REMEDY, missing=missing, signed_since=1, key="format")
        if fields.body.get("format") != FORMAT:
            raise fields.error("format", fields.body.get("format"), str(FORMAT))
        return cls(
            fields.get("identity", dict),
            fields.integer("d_sae", 1),
            fields.integer("n_rows"),
            fields.integer("nnz"),
            fields.get("complete", bool),
            fields.integer("block_rows", 1),
            fields.get("device", str),
            fields.optional("arrays_xxh3", dict),
        )

    def length(self, name: str) -> int:
        """Number of entries of one of the arrays."""
        return {"indptr": self.n_rows + 1, "doc_ids": self.n_rows}.get(name, self.nnz)


def array_path(folder: Path, name: str) -> Path:
    """File of an array."""
    return folder / f"{name}.npy"


def file_bytes(record: CodesRecord, name: str) -> int:
    """Size of the file of an array, with its header."""
    return HEADER_BYTES + record.length(name) * DTYPES[name].itemsize


@dataclass(frozen=True, eq=False)
class StoredCodes:
    """Codes of all rows of a cache, of texts, or of documents; the arrays are memory maps. See `open_codes`."""

    folder: Path
    record: CodesRecord
    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    values: NDArray[np.float32]
    doc_ids: NDArray[np.int64] | None = None  # (N,) None for the rows of a cache, whose column `doc_id` tells

    @property
    def shape(self) -> tuple[int, int]:
        """(N, F)."""
        return self.record.n_rows, self.record.d_sae

    def __len__(self) -> int:
        return self.record.n_rows

    def row(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The latents of a row, ascending, and their activations. Raises IndexError."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is out of range: there are {len(self)} rows")
        part = slice(int(self.indptr[row]), int(self.indptr[row + 1]))
        return self.indices[part], self.values[part]

    def latent(self, latent: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The rows on which a latent is active, ascending, and its activations there; reads all of `indices` once."""
        starts = range(0, len(self.indices), CHUNK)
        found = [start + np.flatnonzero(self.indices[start : start + CHUNK] == latent) for start in starts]
        entries = np.concatenate([np.zeros(0, np.int64), *found])
        return np.searchsorted(self.indptr, entries, side="right") - 1, self.values[entries]

    def dense(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Dense (n, F) float32 matrix of rows start..stop. For tests and small data."""
        offsets = self.indptr[start : (len(self) if stop is None else stop) + 1]
        out = np.zeros((len(offsets) - 1, self.shape[1]), dtype=np.float32)
        part = slice(int(offsets[0]), int(offsets[-1]))
        out[np.repeat(np.arange(len(out)), np.diff(offsets)), self.indices[part]] = self.values[part]
        return out


def open_codes(folder: str | Path, identity: Mapping[str, Any] | None = None) -> StoredCodes:
    """Open complete codes; with `identity` (of a `Source`), only codes of this SAE and cache.

    Raises DamagedCodesError if they are unfinished or truncated, MismatchError if they belong to another SAE or cache.
    """
    folder = Path(folder)
    record = CodesRecord.read(folder)
    if identity is not None:
        check_identity(folder, record.identity, identity)
    if not record.complete:
        raise DamagedCodesError(
            f"{folder}: {record.n_rows:,} rows are encoded and more are to come; "
            "run the same `sae-analyze encode` again"
        )
    names = DTYPES if any(name in record.identity for name in WITH_DOC_IDS) else ARRAYS
    arrays = {name: _map(folder, record, name) for name in names}
    return StoredCodes(folder, record, **arrays)


def check_identity(
    folder: Path, have: Mapping[str, Any], want: Mapping[str, Any], remedy: str = "remove the folder"
) -> None:
    """Raise MismatchError, with both values, if codes or statistics have another SAE, cache, shards or hook point."""
    for name, value in want.items():
        if have.get(name) != value:
            there, here = _difference(have.get(name), value)
            raise MismatchError(f"{folder} belongs to another {name}: {there}, expected {here}; {remedy}")


def check_arrays(codes: StoredCodes) -> None:
    """Raise DamagedCodesError if a file differs from what was written; reads every file once.

    Codes of earlier versions have no checksums: only the range of their latents is checked.
    """
    for name, written in (codes.record.arrays_xxh3 or {}).items():
        path = array_path(codes.folder, name)
        if hash_files([path]) != written:
            raise DamagedCodesError(f"{path} is not what was written: its checksum does not fit; {REMEDY}")
    if codes.record.arrays_xxh3 is None:
        for start in range(0, len(codes.indices), CHUNK):
            check_latents(codes, codes.indices[start : start + CHUNK])


def check_latents(codes: StoredCodes, latents: NDArray[np.int32]) -> None:
    """Raise DamagedCodesError for a latent outside 0..F-1: counting it would allocate memory for all below it."""
    for latent in (latents.min(), latents.max()) if len(latents) else ():
        if not 0 <= latent < codes.shape[1]:
            path = array_path(codes.folder, "indices")
            raise DamagedCodesError(f"{path} holds latent {latent}, expected 0 to {codes.shape[1] - 1}; {REMEDY}")


def _difference(have: Any, want: Any) -> tuple[str, str]:
    """Two values as text; for two mappings, the first entry that differs."""
    if isinstance(have, Mapping) and isinstance(want, Mapping):
        key = next(key for key in {**want, **have} if have.get(key) != want.get(key))
        return f"{key} {have.get(key)!r}", f"{key} {want.get(key)!r}"
    return tuple(str(each)[:60] for each in (have, want))  # type: ignore[return-value]


def _map(folder: Path, record: CodesRecord, name: str) -> NDArray[Any]:
    path = array_path(folder, name)
    try:
        if path.stat().st_size != file_bytes(record, name):
            raise DamagedCodesError(
                f"{path} has {path.stat().st_size:,} bytes, expected {file_bytes(record, name):,}; {REMEDY}"
            )
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        if isinstance(error, DamagedCodesError):
            raise
        raise DamagedCodesError(f"{path} cannot be read: {error}; {REMEDY}") from None
    if array.dtype != DTYPES[name] or array.shape != (record.length(name),):
        raise DamagedCodesError(f"{path} holds {array.dtype}{array.shape}, not what its record says; {REMEDY}")
    return array
