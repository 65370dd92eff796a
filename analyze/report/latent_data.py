"""What the page holds of every latent: columns for the table, and chunks of latents that are decoded when opened.

Blobs, as `packed` writes them:
    overview    density, mean, largest f4 (F,); labels u4 (F, 3): indices of `words` + 1, 0 for none
    words       JSON: texts of the tokens that occur; of pooled rows, beginnings of documents
    tokens_N    token u4: the stream of tokens that the windows cut, 32,768 of them, as indices of `words`
    documents_N JSON: [source, row in the source, kept columns, text of a pooled row] of 512 documents
    latents_N   64 latents; the methods of `_Chunks` say what of them
Shapes: F = d_sae latents, n latents of a chunk, E examples of a latent, M neighbors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_granary.analyze.encoding.codes import StoredCodes
from sae_granary.analyze.latents.latent_stats import BINS_PER_OCTAVE, LOWEST
from sae_granary.analyze.latents.stats import LatentStats
from sae_granary.analyze.report.packed import pack, pack_json
from sae_granary.analyze.report.windows import Windows, activations_at, find_windows
from sae_granary.analyze.report.words import Words, no_words, shortened, words_of_texts, words_of_tokens
from sae_granary.cache.read.reader import Cache

LATENTS, TOKENS, DOCUMENTS = 64, 32_768, 512  # per blob
TEXT_CHARACTERS, CELL_CHARACTERS = 400, 200
FULL = 127  # of an activation in a window, in units of the latent's largest / 127

I64 = NDArray[np.int64]


@dataclass(frozen=True)
class LatentData:
    """Blobs by name, and the metadata to read them."""

    about: Mapping[str, Any]
    blobs: Mapping[str, str] = field(repr=False)


def latent_data(stats: LatentStats, cache: Cache | None = None, codes: StoredCodes | None = None) -> LatentData:
    """All data of all latents. Without the cache and its codes the examples have no tokens.

    Memory: 10 bytes per row of the cache, 14 bytes per example and one chunk of latents.
    """
    chunks = _Chunks(stats, cache, codes)
    about = {
        "d_sae": len(stats.fired),
        "n_rows": stats.n_rows,
        "n_top": stats.example_rows.shape[1],
        "n_bands": stats.quantile_rows.shape[1],
        "coactive_rows": stats.coactive_rows,
        "latents_per_blob": LATENTS,
        "tokens_per_blob": TOKENS,
        "documents_per_blob": DOCUMENTS,
        "bins_per_octave": BINS_PER_OCTAVE,
        "lowest_octave": LOWEST,
        "texts": "none" if cache is None else cache.unit,
    }
    return LatentData(about, dict(chunks.blobs()))


class _Chunks:
    """The examples of all latents in one (F, E) table: the strongest first, then those of intervals, highest first."""

    def __init__(self, stats: LatentStats, cache: Cache | None, codes: StoredCodes | None) -> None:
        self.stats, self.cache, self.codes = stats, cache, codes
        self.rows = np.concatenate([stats.example_rows, stats.quantile_rows[:, ::-1]], axis=1).astype(np.int64)
        self.values = np.concatenate([stats.example_values, stats.quantile_values[:, ::-1]], axis=1)
        self.logits = {
            "raised": (stats.logit_tokens_top, stats.logit_values_top),
            "lowered": (stats.logit_tokens_bottom, stats.logit_values_bottom),
        }
        self.windows: Windows | None = None
        if cache is not None and codes is not None and cache.unit == "token":
            self.windows = find_windows(cache, self.rows.ravel())
        self.words = self._words()
        self.documents = np.zeros(0, np.int64)  # ids of those of all examples, ascending
        if cache is not None:
            self.documents = np.unique(cache.column("doc_id")[np.unique(self.rows[self.rows >= 0])]).astype(np.int64)

    def _words(self) -> Words:
        if self.cache is None:
            return no_words(len(self.stats.fired))
        if self.cache.unit == "text":
            return words_of_texts(self.cache, self.stats.example_rows)
        rows = np.zeros(0, np.int64) if self.windows is None else self.windows.rows
        others = [tokens for tokens, _ in self.logits.values() if tokens is not None]
        return words_of_tokens(self.cache, self.stats.example_rows, rows, others)

    def blobs(self) -> Iterator[tuple[str, str]]:
        """Names and texts of the blobs."""
        stats, d_sae = self.stats, len(self.stats.fired)
        columns: dict[str, NDArray[Any]] = {"density": stats.density, "mean": stats.mean, "largest": stats.largest}
        overview = {name: column.astype(np.float32) for name, column in columns.items()}
        yield "overview", pack(overview | {"labels": self.words.labels})
        yield "words", pack_json(self.words.texts)
        for number, start in enumerate(range(0, len(self.words.stream), TOKENS)):
            yield f"tokens_{number}", pack({"token": self.words.stream[start : start + TOKENS]})
        for number, start in enumerate(range(0, len(self.documents), DOCUMENTS)):
            found = [self._document(doc_id) for doc_id in self.documents[start : start + DOCUMENTS].tolist()]
            yield f"documents_{number}", pack_json(found)
        for number, start in enumerate(range(0, d_sae, LATENTS)):
            part = slice(start, min(start + LATENTS, d_sae))
            arrays = self._examples(part) | self._histogram(part) | self._others(part) | self._logits(part)
            yield f"latents_{number}", pack(arrays)

    def _examples(self, part: slice) -> dict[str, NDArray[Any]]:
        """value f4, document u4, start u4, before u1, length u1 (n, E); activation i1 of each token of the windows.

        `length` is 0 without an example, and 1 where there is one without tokens.
        """
        rows = self.rows[part]
        found: dict[str, NDArray[Any]] = {
            "value": self.values[part].astype(np.float32),
            "length": (rows >= 0).astype(np.uint8),
        }
        if self.cache is not None:
            doc_ids = self.cache.column("doc_id")[np.where(rows >= 0, rows, 0).ravel()].astype(np.int64)
            found["document"] = np.searchsorted(self.documents, doc_ids).astype(np.uint32)
        if self.windows is None or self.codes is None:
            return found
        windows, n_examples = self.windows, rows.shape[1]
        flat = slice(part.start * n_examples, part.stop * n_examples)
        places, inside = windows.places(flat)
        latents = np.repeat(np.arange(part.start, part.stop), inside.sum(1).reshape(rows.shape).sum(1))
        acts = activations_at(self.codes, windows.rows[places[inside]], latents)
        return found | {
            "start": windows.start[flat],
            "before": windows.before[flat],
            "length": windows.length[flat],
            "activation": scaled(acts, self.stats.largest[latents]),
        }

    def _histogram(self, part: slice) -> dict[str, NDArray[Any]]:
        """bin_low u1 (n,) first bin that is shown, bin_n u1 (n,) how many, and the counts of all of them, bins u4."""
        counts = self.stats.histogram[part]
        filled = counts > 0
        low = np.where(filled.any(1), filled.argmax(1), 0)
        n = np.where(filled.any(1), counts.shape[1] - filled[:, ::-1].argmax(1) - low, 0)
        bins = np.arange(counts.shape[1])
        shown = (bins >= low[:, None]) & (bins < (low + n)[:, None])
        return {
            "bin_low": low.astype(np.uint8),
            "bin_n": n.astype(np.uint8),
            "bins": counts[shown].astype(np.uint32),
        }

    def _others(self, part: slice) -> dict[str, NDArray[Any]]:
        """neighbor and coactive u4, 2**32 - 1 for none; cosine and coactive_score f4 (n, M)."""
        stats = self.stats
        together = stats.coactive[part]
        return {
            "neighbor": stats.neighbors[part].astype(np.uint32),
            "cosine": stats.cosines[part].astype(np.float32),
            "coactive": np.where(together >= 0, together, 2**32 - 1).astype(np.uint32),
            "coactive_score": stats.coactive_score[part].astype(np.float32),
        }

    def _logits(self, part: slice) -> dict[str, NDArray[Any]]:
        """raised and lowered u4: indices of `words`; raised_by and lowered_by f4 (n, L). Nothing without a head."""
        found: dict[str, NDArray[Any]] = {}
        for name, (tokens, values) in self.logits.items():
            if tokens is not None and values is not None and len(self.words.texts):
                found[name] = self.words.index(tokens[part])
                found[f"{name}_by"] = values[part].astype(np.float32)
        return found

    def _document(self, doc_id: int) -> list[Any]:
        """[source, row in the source, {column: value}, text of a pooled row]."""
        assert self.cache is not None
        found = self.cache.find_document(doc_id)
        if found is None:
            return ["", doc_id, {}, ""]
        columns = {_cell(name): _cell(value) for name, value in found.columns.items()}
        text = shortened(found.text, TEXT_CHARACTERS) if self.cache.unit == "text" else ""
        return [_cell(found.source), found.source_row, columns, text]


def scaled(acts: NDArray[np.float32], largest: NDArray[np.float32]) -> NDArray[np.int8]:
    """Activations (P,) in units of their latent's largest / 127; an active one is never 0."""
    units = np.rint(acts / np.maximum(largest, np.float32(1e-30)) * FULL)
    units = np.where((units == 0) & (acts != 0), np.sign(acts), units)
    return np.clip(units, -FULL, FULL).astype(np.int8)


def _cell(value: Any) -> str:
    return shortened("" if value is None else str(value), CELL_CHARACTERS)
