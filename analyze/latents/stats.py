"""`sae-analyze stats`: two passes over stored codes of a cache; the statistics are stored beside them.

Shapes: F = d_sae latents, E examples per latent, Q intervals of the activation, M neighbors, L tokens, B bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_granary.analyze.counted_rows import CountedFlags
from sae_granary.analyze.encoding.blocks import stored_blocks
from sae_granary.analyze.encoding.codes import CodesFields, StoredCodes, check_arrays, check_identity
from sae_granary.analyze.errors import DamagedCodesError
from sae_granary.analyze.latents.coactive import coactive, sample_size, spread
from sae_granary.analyze.latents.latent_stats import N_BINS, Accumulator, Examples, nearest_neighbors
from sae_granary.analyze.latents.quantile_examples import QuantileExamples
from sae_granary.analyze.source import Source
from sae_granary.common.files import hash_files, new_folder
from sae_granary.common.lock import FolderLock
from sae_granary.common.signed import write_signed
from sae_granary.common.threads import waiting

RECORD, ARRAYS, LOCK = "stats.json", "stats.npz", ".stats.lock"
FORMAT = 3  # those of earlier formats are computed again
N_EXAMPLES, N_NEIGHBORS, N_COACTIVE = 10, 5, 5


@dataclass(frozen=True, eq=False)
class LatentStats:
    """Statistics of every latent over the counted rows of a cache; see `CountedFlags`."""

    n_rows: int
    fired: NDArray[np.int64]  # (F,) rows on which each latent is active
    mean: NDArray[np.float64]  # (F,) mean activation of the active rows; 0 for a silent latent
    largest: NDArray[np.float32]  # (F,) largest magnitude
    histogram: NDArray[np.int64]  # (F, B) of magnitudes; see `latent_stats.quantile`
    example_rows: NDArray[np.int64]  # (F, E) rows of the cache, strongest first, of different documents; -1: none
    example_values: NDArray[np.float32]  # (F, E)
    quantile_rows: NDArray[
        np.int64
    ]  # (F, Q) a row of each fifth of [0, largest], lowest first; -1: no activation there
    quantile_values: NDArray[np.float32]  # (F, Q)
    neighbors: NDArray[np.int64]  # (F, M) latents with the most similar decoder rows
    cosines: NDArray[np.float32]  # (F, M)
    coactive: NDArray[np.int64]  # (F, M) latents most often active on the same rows; -1: none
    coactive_score: NDArray[np.float32]  # (F, M) Jaccard index: rows with both over rows with at least one
    coactive_rows: int  # sampled for it, at most 16,384, evenly spread over the cache
    logit_tokens_top: NDArray[np.int64] | None = None  # (F, L) tokens whose logits a latent raises most; None: no head
    logit_values_top: NDArray[np.float32] | None = None  # (F, L) added to the logit per unit of activation
    logit_tokens_bottom: NDArray[np.int64] | None = None  # (F, L) lowers most, the lowest first
    logit_values_bottom: NDArray[np.float32] | None = None  # (F, L)

    @property
    def density(self) -> NDArray[np.float64]:
        """Share (F,) of rows on which each latent is active."""
        return self.fired / max(self.n_rows, 1)


@dataclass(frozen=True, eq=False)
class Block:
    """Codes of some counted rows of a cache; arrays (nnz,) have one entry per active latent."""

    n_rows: int
    place: NDArray[np.int64]  # which of the n_rows it is of, ascending
    row: NDArray[np.int64]  # the same as a row of the cache
    document: NDArray[np.int64]
    latent: NDArray[np.int64]
    value: NDArray[np.float32]


def blocks_of(source: Source, codes: StoredCodes) -> Iterator[Block]:
    """Codes of the counted rows of a cache, in the blocks of `stored_blocks`."""
    start = 0
    for stored in stored_blocks(codes, source.cache.column("doc_id"), CountedFlags(source.cache)):
        row, plain = np.repeat(np.arange(len(stored.counts)), stored.counts), ~stored.special
        kept, places = plain[row], np.cumsum(plain) - 1
        row, latent = row[kept], stored.indices[kept].astype(np.int64)
        yield Block(int(plain.sum()), places[row], row + start, stored.doc_ids[row], latent, stored.values[kept])
        start += len(stored.counts)


def compute_stats(source: Source, codes: StoredCodes, *, n_examples: int = N_EXAMPLES) -> LatentStats:
    """Two passes over codes of a cache: what is counted, then the examples of intervals, which need the maxima.

    Memory, whatever the number of rows: some 100 bytes for each of 2**20 entries, the entries of the rows sampled for
    co-activation, and F * (B + 3 E + 3 Q) numbers. The codes are read twice.
    """
    d_sae = codes.shape[1]
    counted, n_pairs = Accumulator(d_sae, Examples(n_examples)), 0.0
    for block in blocks_of(source, codes):
        counted.update(block.latent, block.value, block.row, block.document, block.n_rows)
        n_pairs += float(np.square(np.bincount(block.place), dtype=np.float64).sum())
    examples = QuantileExamples(counted.largest)
    sample = spread(counted.n_rows, sample_size(n_pairs, counted.n_rows))
    before, parts = 0, []
    for block in blocks_of(source, codes):
        examples.update(block.latent, block.value, block.row, block.document)
        parts.append(_sampled(block, sample, before))
        before += block.n_rows
    row, latent = np.concatenate(parts, axis=1) if parts else np.zeros((2, 0), np.int64)
    together, score = coactive(row, latent, d_sae, N_COACTIVE)
    rows, values = counted.examples.tables(d_sae)
    histogram = counted.histogram.reshape(d_sae, N_BINS)
    mean = counted.sums / np.maximum(counted.fired, 1)
    return LatentStats(
        counted.n_rows, counted.fired, mean, counted.largest, histogram, rows, values, *examples.tables(),
        *nearest_neighbors(source.sae.core.W_dec, N_NEIGHBORS), together, score, len(sample),
    )  # fmt: skip


def _sampled(block: Block, sample: NDArray[np.int64], before: int) -> NDArray[np.int64]:
    """Entries of sampled rows: (2, nnz) index in the sample, and latent."""
    low, high = np.searchsorted(sample, [before, before + block.n_rows])
    number = np.full(block.n_rows, -1, np.int64)
    number[sample[low:high] - before] = np.arange(low, high)
    found = number[block.place]
    return np.stack([found, block.latent])[:, found >= 0]


def stats_folder(source: Source) -> Path:
    """Folder of the statistics of an SAE and a cache."""
    return source.place / "stats"


def save_stats(stats: LatentStats, source: Source, folder: Path) -> None:
    """Write statistics into a folder, atomically."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as temporary:
        np.savez(temporary / ARRAYS, **{name: value for name, value in vars(stats).items() if value is not None})
        body = {"format": FORMAT, "identity": source.identity, "npz_xxh3": hash_files([temporary / ARRAYS])}
        write_signed(temporary / RECORD, body)


def read_stats(folder: Path, identity: Mapping[str, Any]) -> LatentStats:
    """Load statistics; `identity` is that of a `Source`, or entries of it.

    Raises DamagedCodesError, and MismatchError for those of another SAE or cache.
    """
    fields = _fields(folder)
    check_identity(folder, fields.get("identity", dict), identity)
    if fields.body.get("format") != FORMAT:
        raise fields.error("format", fields.body.get("format"), str(FORMAT))
    if hash_files([folder / ARRAYS]) != fields.get("npz_xxh3", str):
        raise DamagedCodesError(f"{folder / ARRAYS} is not what was written; {_remedy(folder)}")
    with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
        found: dict[str, Any] = {
            name: arrays[name] if arrays[name].ndim else int(arrays[name]) for name in arrays.files
        }
    return LatentStats(**found)


def find_stats(source: Source, make_codes: Callable[[], StoredCodes]) -> LatentStats:
    """The stored statistics of an SAE and a cache; computed and stored if there are none of this format.

    Raises LockedError while another process computes them.
    """
    folder = stats_folder(source)
    if not _is_stored(folder):
        codes, lock = make_codes(), FolderLock(source.place / LOCK)
        source.place.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        try:
            if not _is_stored(folder):
                check_arrays(codes)
                with waiting("computing the statistics of the latents"):
                    save_stats(compute_stats(source, codes), source, folder)
        finally:
            lock.release()
    return read_stats(folder, source.identity)


def _is_stored(folder: Path) -> bool:
    return (folder / RECORD).is_file() and _fields(folder).body.get("format") == FORMAT


def _fields(folder: Path) -> CodesFields:
    return CodesFields.of_file(folder / RECORD, _remedy(folder), signed_since=1, key="format")


def _remedy(folder: Path) -> str:
    return f"remove {folder} and run `sae-analyze stats` again"
