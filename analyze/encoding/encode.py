"""SAE + cache -> codes on disk, block by block, in bounded memory; a killed encoding continues to the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_granary.analyze.encoding.codes import (
    ANOTHER_OUT,
    ARRAYS,
    RECORD,
    CodesRecord,
    StoredCodes,
    array_path,
    check_identity,
    file_bytes,
    open_codes,
)
from sae_granary.analyze.encoding.csr_files import CSRFiles
from sae_granary.analyze.errors import AnalyzeError, DamagedCodesError, MismatchError
from sae_granary.analyze.source import Source, open_source
from sae_granary.common.files import remove_temporary, shortage
from sae_granary.common.lock import FolderLock
from sae_granary.sae_core import Codes

BLOCK_ROWS = 4096  # encoded at once
COMMIT_BLOCKS = 16  # between records: what a kill costs at most
LOCK = ".lock"

Tick = Callable[[int], None]  # called with the number of rows written; may raise to stop


def csr_of(codes: Codes) -> dict[str, NDArray[Any]]:
    """Codes as canonical CSR: no zeros, latents ascending within a row, one that a row holds twice summed.

    Returns counts (N,) int64 entries per row, indices (nnz,) int32, values (nnz,) float32.
    """
    n_rows, d_sae = codes.shape
    indices, values = codes.indices.cpu().numpy(), codes.values.reshape(-1).float().cpu().numpy()
    rows = np.repeat(np.arange(n_rows), np.diff(codes.indptr.cpu().numpy()))
    keys = rows * d_sae + indices
    order = np.argsort(keys, kind="stable")
    keys, values = keys[order], values[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    if len(first) < len(keys):
        keys, values = keys[first], np.add.reduceat(values, first)
    kept = values != 0
    keys, values = keys[kept], values[kept]
    counts = np.bincount(keys // d_sae, minlength=n_rows)
    return {"counts": counts, "indices": (keys % d_sae).astype(np.int32), "values": values.astype(np.float32)}


def encode_cache(
    source: Source | str | Path,
    out: str | Path | None = None,
    *,
    cache: str | Path | None = None,
    device: str = "auto",
    block_rows: int = BLOCK_ROWS,
    commit_blocks: int = COMMIT_BLOCKS,
    tick: Tick = lambda n_rows: None,
) -> StoredCodes:
    """The codes of every row of a cache: those that are stored, or encoded now and stored.

    `source` is the folder of an SAE, whose record names the cache (or `cache` does), or an open `Source`. Codes are in
    `out`, by default in the SAE's folder, where `sae-analyze` finds them too; interrupted ones are continued. Memory:
    one block of rows and its codes.

    >>> from sae_granary import encode_cache
    >>> codes = encode_cache("runs/demo_topk", device="cpu")
    >>> latents, activations = codes.row(17)  # of row 17 of the cache; codes.latent(3) gives the rows of latent 3
    >>> len(latents), codes.shape[1]
    (8, 768)

    Raises MismatchError if SAE and cache do not fit or the folder holds codes of something else, LockedError while
    another process writes them, AnalyzeError where the disk is full.
    """
    if not isinstance(source, Source):
        source = open_source(source, cache, device=device)
    out = source.place / "codes" if out is None else Path(out)
    out.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(out / LOCK)
    lock.acquire()
    try:
        record = _begun(source, out, block_rows)
        if not record.complete:
            source.stage()
            _write(source, out, record, commit_blocks, tick)
    except OSError as error:
        if text := shortage(error, out):
            raise AnalyzeError(f"{text}; free some space and run the same command again: it continues") from None
        raise
    finally:
        lock.release()
    return open_codes(out, source.identity)


def _begun(source: Source, out: Path, block_rows: int) -> CodesRecord:
    """The existing record if it belongs to this SAE and cache, or a new record for an empty folder."""
    device = source.sae.core.W_dec.device.type
    fresh = CodesRecord(source.identity, source.sae.config.d_sae, 0, 0, False, block_rows, device)
    if not (out / RECORD).exists():
        remove_temporary(out)
        if other := [path.name for path in out.iterdir() if path.name not in _names()]:
            raise MismatchError(f"{out} holds {other[0]}, expected an empty folder or codes; give another --out")
        return fresh
    record = CodesRecord.read(out)
    remedy = () if out == source.place / "codes" else (ANOTHER_OUT,)  # every command has its codes there
    check_identity(out, record.identity, source.identity, *remedy)
    if not record.complete:
        check_identity(out, {"device": record.device}, {"device": device}, *remedy)
        check_identity(out, {"block size": record.block_rows}, {"block size": block_rows}, *remedy)
        for name in ARRAYS:
            path = array_path(out, name)
            if record.n_rows and (not path.is_file() or path.stat().st_size < file_bytes(record, name)):
                raise DamagedCodesError(f"{path} is shorter than its record says; remove {out} and encode again")
    return record


def _names() -> set[str]:
    return {LOCK, *(f"{name}.npy" for name in ARRAYS)}


def _write(source: Source, out: Path, record: CodesRecord, commit_blocks: int, tick: Tick) -> None:
    n_rows, size = source.cache.n_rows, record.block_rows
    with CSRFiles(out, record) as files:
        for number, start in enumerate(range(record.n_rows, n_rows, size), 1):
            stop = min(start + size, n_rows)
            files.append(**csr_of(source.encode(start, stop)))
            if number % commit_blocks == 0:
                files.commit()
            tick(stop)
        files.finish()
