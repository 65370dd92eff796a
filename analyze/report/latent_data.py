"""What the page holds of every latent: columns for the table, and chunks of latents that are decoded when opened.

Blobs, as `packed` writes them:
    overview    density, mean, largest f4 (F,); labels u4 (F, 3): indices of `words` + 1, 0 for none
    words       JSON: texts of the tokens that occur; of pooled rows, beginnings of documents
    tokens_N    token u4: the stream of tokens that the windows cut, 32,768 of them, as indices of `words`
    documents_N JSON: [source, row in the source, kept columns, text of a pooled row] of 512 documents
    latents_N   256 latents, see `_Chunks`
Shapes: F = d_sae latents, E examples of a latent, X = F * E.
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
from sae_granary.analyze.report.token_texts import displayed
from sae_granary.analyze.report.windows import Windows, activations_at, find_windows
from sae_granary.cache.read.reader import Cache
from sae_granary.common.errors import printable

LATENTS, TOKENS, DOCUMENTS = 256, 32_768, 512  # per blob
N_LABELS = 3
LABEL_CHARACTERS, TEXT_CHARACTERS, CELL_CHARACTERS = 60, 400, 200
FULL = 127  # of an activation in a window, in units of the latent's largest / 127

I64 = NDArray[np.int64]


@dataclass(frozen=True)
class LatentData:
    """The blobs by name, and what the page must know to read them."""

    about: Mapping[str, Any]
    blobs: Mapping[str, str] = field(repr=False)


def latent_data(stats: LatentStats, cache: Cache | None = None, codes: StoredCodes | None = None) -> LatentData:
    """Everything about all latents. Without the cache and its codes the examples have no tokens.

    Memory: 10 bytes per row of the cache, 14 bytes per example and one chunk of latents.
    """
    chunks = _Chunks(stats, cache, codes)
    blobs = dict(chunks.blobs())
    about = {
        "d_sae": len(stats.fired),
        "n_rows": stats.n_rows,
        "n_top": chunks.n_top,
        "n_bands": chunks.n_bands,
        "latents_per_blob": LATENTS,
        "tokens_per_blob": TOKENS,
        "documents_per_blob": DOCUMENTS,
        "bins_per_octave": BINS_PER_OCTAVE,
        "lowest_octave": LOWEST,
        "texts": "none" if cache is None else cache.unit,
    }
    return LatentData(about, blobs)


class _Chunks:
    """The examples of all latents in one (F, E) table: the strongest first, then one per quantile band."""

    def __init__(self, stats: LatentStats, cache: Cache | None, codes: StoredCodes | None) -> None:
        self.stats, self.cache, self.codes = stats, cache, codes
        d_sae = len(stats.fired)
        bands = getattr(stats, "quantile_rows", np.zeros((d_sae, 0), np.int64)).reshape(d_sae, -1)
        band_values = getattr(stats, "quantile_values", np.zeros((d_sae, 0), np.float32)).reshape(d_sae, -1)
        self.n_top, self.n_bands = stats.example_rows.shape[1], bands.shape[1]
        self.rows = np.concatenate([stats.example_rows, bands], axis=1).astype(np.int64)
        self.values = np.concatenate([stats.example_values, band_values], axis=1).astype(np.float32)
        self.windows: Windows | None = None
        if cache is not None and codes is not None and cache.unit == "token":
            self.windows = find_windows(cache, self.rows.ravel())

    def blobs(self) -> Iterator[tuple[str, str]]:
        """Name and text of each."""
        stats, d_sae = self.stats, len(self.stats.fired)
        documents = self._documents()
        labels, words, tokens = self._labels()
        yield (
            "overview",
            pack(
                {
                    "density": stats.density.astype(np.float32),
                    "mean": stats.mean.astype(np.float32),
                    "largest": stats.largest.astype(np.float32),
                    "labels": labels.astype(np.uint32),
                }
            ),
        )
        yield "words", pack_json([printable(word) for word in words])
        for number, start in enumerate(range(0, len(tokens), TOKENS)):
            yield f"tokens_{number}", pack({"token": tokens[start : start + TOKENS].astype(np.uint32)})
        for number, start in enumerate(range(0, len(documents), DOCUMENTS)):
            yield (
                f"documents_{number}",
                pack_json([self._document(doc_id) for doc_id in documents[start : start + DOCUMENTS].tolist()]),
            )
        for number, start in enumerate(range(0, d_sae, LATENTS)):
            part = slice(start, min(start + LATENTS, d_sae))
            yield f"latents_{number}", pack(self._examples(part, documents) | self._numbers(part))

    def _numbers(self, part: slice) -> dict[str, NDArray[Any]]:
        """neighbor u4, cosine f4 (n, M); bins of the histogram from bin_low u1 (n,) on, bin_n u1 (n,) of them, u4."""
        stats = self.stats
        counts = stats.histogram[part]
        filled = counts > 0
        low = np.where(filled.any(1), filled.argmax(1), 0)
        n = np.where(filled.any(1), counts.shape[1] - filled[:, ::-1].argmax(1) - low, 0)
        bins = np.arange(counts.shape[1])
        shown = (bins >= low[:, None]) & (bins < (low + n)[:, None])
        return {
            "neighbor": stats.neighbors[part].astype(np.uint32),
            "cosine": stats.cosines[part].astype(np.float32),
            "bin_low": low.astype(np.uint8),
            "bin_n": n.astype(np.uint8),
            "bins": counts[shown].astype(np.uint32),
            **self._together(part),
            **self._logits(part),
        }

    def _together(self, part: slice) -> dict[str, NDArray[Any]]:
        """coactive u4, none of them above d_sae, and coactive_score f4 (n, M)."""
        found, stats = {}, self.stats
        if (latents := stats.coactive[part]).size:
            found["coactive"] = np.where(latents >= 0, latents, 2**32 - 1).astype(np.uint32)
            found["coactive_score"] = stats.coactive_score[part].astype(np.float32)
        return found

    def _logits(self, part: slice) -> dict[str, NDArray[Any]]:
        """raised and lowered u4: indices of `words`; raised_by and lowered_by f4 (n, L); nothing without a head."""
        stats, found = self.stats, {}
        sides = (
            ("raised", stats.logit_tokens_top, stats.logit_values_top),
            ("lowered", stats.logit_tokens_bottom, stats.logit_values_bottom),
        )
        for name, tokens, values in sides:
            if tokens is not None and values is not None and len(self.known):
                found[name] = np.searchsorted(self.known, tokens[part]).astype(np.uint32)
                found[f"{name}_by"] = values[part].astype(np.float32)
        return found

    def _examples(self, part: slice, documents: I64) -> dict[str, NDArray[Any]]:
        """value f4, document u4, start u4, before u1, length u1 (n, E); activation i1 of each token of the windows.

        `length` is 0 without an example, and 1 where there is one without tokens.
        """
        rows, values = self.rows[part], self.values[part]
        found: dict[str, NDArray[Any]] = {"value": values, "length": (rows >= 0).astype(np.uint8)}
        if self.cache is not None:
            there = np.where(rows >= 0, rows, 0).ravel()
            doc_ids = self.cache.column("doc_id")[there].astype(np.int64)
            found["document"] = np.searchsorted(documents, doc_ids).astype(np.uint32)
        if self.windows is None or self.codes is None:
            return found
        n_examples = self.rows.shape[1]
        flat = slice(part.start * n_examples, part.stop * n_examples)
        windows = self.windows
        places, inside = windows.places(flat)
        latents = np.repeat(np.arange(part.start, part.stop), inside.sum(1).reshape(rows.shape).sum(1))
        acts = activations_at(self.codes, windows.rows[places[inside]], latents)
        scale = np.maximum(self.stats.largest[latents], np.float32(1e-30))
        scaled = np.rint(acts / scale * FULL)
        scaled = np.where((scaled == 0) & (acts != 0), np.sign(acts), scaled)
        return found | {
            "start": windows.start[flat],
            "before": windows.before[flat],
            "length": windows.length[flat],
            "activation": np.clip(scaled, -FULL, FULL).astype(np.int8),
        }

    def _documents(self) -> I64:
        """Ids of the documents of all examples, ascending."""
        if self.cache is None:
            return np.zeros(0, np.int64)
        rows = self.rows[self.rows >= 0]
        return np.unique(self.cache.column("doc_id")[np.unique(rows)]).astype(np.int64)

    def _document(self, doc_id: int) -> list[Any]:
        """[source, row in the source, {column: value}, text of a pooled row]."""
        assert self.cache is not None
        found = self.cache.find_document(doc_id)
        if found is None:
            return ["", doc_id, {}, ""]
        columns = {_cell(name): _cell(value) for name, value in getattr(found, "columns", {}).items()}
        text = _short(found.text, TEXT_CHARACTERS) if self.cache.unit == "text" else ""
        return [_cell(found.source), found.source_row, columns, text]

    def _labels(self) -> tuple[NDArray[np.uint32], list[str], NDArray[np.uint32]]:
        """Labels (F, 3), the words that they and the stream of tokens index, and that stream."""
        labels = np.zeros((len(self.stats.fired), N_LABELS), np.uint32)
        stream = np.zeros(0, np.uint32)
        if self.cache is None:
            return labels, [], stream
        if self.cache.unit == "text":
            return *self._text_labels(labels), stream
        top = self.rows[:, : self.n_top]
        column = self.cache.column("token_id")
        ids = column[np.where(top >= 0, top, 0).ravel()].reshape(top.shape).astype(np.int64)
        of_windows = column[self.windows.rows].astype(np.int64) if self.windows is not None else np.zeros(0, np.int64)
        known = np.unique(np.concatenate([ids[top >= 0], of_windows]))
        places = np.where(top >= 0, np.searchsorted(known, ids) + 1, 0)
        for start in range(0, len(labels), LATENTS):
            labels[start : start + LATENTS] = _most_frequent(places[start : start + LATENTS], N_LABELS)
        vocabulary = self.cache.vocabulary or []
        words = displayed([vocabulary[i] if 0 <= i < len(vocabulary) else f"#{i}" for i in known.tolist()], vocabulary)
        return labels, words, np.searchsorted(known, of_windows).astype(np.uint32)

    def _text_labels(self, labels: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], list[str]]:
        """The beginning of the strongest document of each latent."""
        assert self.cache is not None
        top = self.rows[:, 0]
        ids = self.cache.column("doc_id")[np.where(top >= 0, top, 0)].astype(np.int64)
        known = np.unique(ids[top >= 0])
        labels[:, 0] = np.where(top >= 0, np.searchsorted(known, ids) + 1, 0)
        found = [self.cache.find_document(doc_id) for doc_id in known.tolist()]
        return labels, [_short(document.text, LABEL_CHARACTERS) if document else "" for document in found]


def _most_frequent(places: I64, n: int) -> I64:
    """(m, n) of each row (m, E) the most frequent positive numbers, the earlier first among equal ones; 0 for none."""
    same = places[:, :, None] == places[:, None, :]
    earlier = np.tril(np.ones(same.shape[1:], np.bool_), -1)
    first = ~(same & earlier).any(2) & (places > 0)
    order = np.argsort(-np.where(first, same.sum(2), 0), axis=1, kind="stable")[:, :n]
    found = np.take_along_axis(np.where(first, places, 0), order, axis=1)
    return np.pad(found, ((0, 0), (0, n - found.shape[1])))


def _short(text: str, n: int) -> str:
    line = " ".join(text.split())
    return printable(line if len(line) <= n else line[: n - 1] + "\u2026")


def _cell(value: Any) -> str:
    return _short("" if value is None else str(value), CELL_CHARACTERS)
