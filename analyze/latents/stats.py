"""`sae-analyze stats`: one pass over the codes of a cache, stored beside them.

Shapes: F = d_sae latents, E examples per latent, M neighbors, B bins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sae_granary.analyze.encoding.codes import CodesFields, StoredCodes, check_identity
from sae_granary.analyze.encoding.encode import Tick
from sae_granary.analyze.errors import DamagedCodesError
from sae_granary.analyze.latents.latent_stats import N_BINS, Accumulator, Examples, nearest_neighbors
from sae_granary.analyze.source import Source
from sae_granary.common.files import hash_files, new_folder
from sae_granary.common.rows import FLAG_SPECIAL
from sae_granary.common.signed import write_signed

RECORD, ARRAYS = "stats.json", "stats.npz"
FORMAT = 1
BLOCK_ROWS = 2**15
N_EXAMPLES, N_NEIGHBORS = 10, 5


@dataclass(frozen=True, eq=False)
class LatentStats:
    """Statistics of every latent over the rows of a cache, special tokens left out."""

    n_rows: int
    fired: NDArray[np.int64]  # (F,) rows on which each latent is active
    mean: NDArray[np.float64]  # (F,) mean activation of the active rows; 0 for a silent latent
    largest: NDArray[np.float32]  # (F,) largest magnitude
    histogram: NDArray[np.int64]  # (F, B) of magnitudes; see `latent_stats.quantile`
    example_rows: NDArray[np.int64]  # (F, E) rows of the cache, strongest first, of different documents; -1: none
    example_values: NDArray[np.float32]  # (F, E)
    neighbors: NDArray[np.int64]  # (F, M) latents with the most similar decoder rows
    cosines: NDArray[np.float32]  # (F, M)

    @property
    def density(self) -> NDArray[np.float64]:
        """(F,) share of the rows on which each latent is active."""
        return self.fired / max(self.n_rows, 1)


def compute_stats(
    source: Source, codes: StoredCodes, *, n_examples: int = N_EXAMPLES, tick: Tick = lambda n_rows: None
) -> LatentStats:
    """One pass over codes of a cache. Memory: the codes of 32,768 rows and F * (B + 2 E) numbers."""
    d_sae = codes.shape[1]
    counted = Accumulator(d_sae, Examples(n_examples))
    doc_ids, flags = source.cache.column("doc_id"), source.cache.column("flags")
    for start in range(0, len(codes), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(codes))
        offsets = codes.indptr[start : stop + 1]
        part = slice(int(offsets[0]), int(offsets[-1]))
        row = np.repeat(np.arange(stop - start), np.diff(offsets))
        plain = flags[start:stop] & FLAG_SPECIAL == 0
        kept = plain[row]
        row, latent = row[kept], codes.indices[part][kept].astype(np.int64)
        counted.update(latent, codes.values[part][kept], row + start, doc_ids[start:stop][row], int(plain.sum()))
        tick(stop)
    rows, values = counted.examples.tables(d_sae)
    neighbors, cosines = nearest_neighbors(source.sae.core.W_dec, N_NEIGHBORS)
    histogram = counted.histogram.reshape(d_sae, N_BINS)
    mean = counted.sums / np.maximum(counted.fired, 1)
    return LatentStats(
        counted.n_rows, counted.fired, mean, counted.largest, histogram, rows, values, neighbors, cosines
    )


def save_stats(stats: LatentStats, source: Source, folder: Path) -> None:
    """Write statistics into a folder, atomically."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as temporary:
        np.savez(temporary / ARRAYS, **vars(stats))
        body = {"format": FORMAT, "identity": source.identity, "npz_xxh3": hash_files([temporary / ARRAYS])}
        write_signed(temporary / RECORD, body)


def load_stats(source: Source, folder: Path) -> LatentStats:
    """The statistics of a folder. Raises DamagedCodesError, and MismatchError for those of another SAE or cache."""
    remedy = f"remove {folder} and run `sae-analyze stats` again"
    fields = CodesFields.of_file(folder / RECORD, remedy, signed_since=1, key="format")
    check_identity(folder, fields.get("identity", dict), source.identity)
    if hash_files([folder / ARRAYS]) != fields.get("npz_xxh3", str):
        raise DamagedCodesError(f"{folder / ARRAYS} is not what was written; {remedy}")
    with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
        return LatentStats(int(arrays["n_rows"]), **{name: arrays[name] for name in arrays.files if name != "n_rows"})


def find_stats(source: Source, make_codes: Callable[[], StoredCodes], tick: Tick = lambda n_rows: None) -> LatentStats:
    """The stored statistics of an SAE and a cache; computed, and stored, where there are none."""
    folder = source.place / "stats"
    if not (folder / RECORD).is_file():
        save_stats(compute_stats(source, make_codes(), tick=tick), source, folder)
    return load_stats(source, folder)
