"""The words of a report: texts of its tokens, and the tokens that label each latent.

Shapes: F = d_sae latents, E strongest examples of a latent, R rows of the windows, V words.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_granary.analyze.token_texts import displayed
from sae_granary.cache.read.reader import Cache
from sae_granary.common.errors import printable

N_LABELS = 3
LABEL_CHARACTERS = 60
BLOCK = 4096  # latents at a time

I64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Words:
    """Words, and references to them by index."""

    texts: list[str]  # (V,)
    ids: I64  # (V,) token id of each, ascending; of pooled rows document ids
    labels: NDArray[np.uint32]  # (F, 3) most frequent tokens of the strongest examples, as index + 1; 0: none
    stream: NDArray[np.uint32]  # (R,) the words of the rows of all windows

    def index(self, ids: NDArray[Any]) -> NDArray[np.uint32]:
        """Indices of ids, all of which are known."""
        return np.searchsorted(self.ids, ids).astype(np.uint32)


def no_words(d_sae: int) -> Words:
    """The words of a page without texts."""
    return Words([], np.zeros(0, np.int64), np.zeros((d_sae, N_LABELS), np.uint32), np.zeros(0, np.uint32))


def words_of_tokens(cache: Cache, top: I64, rows: I64, others: Iterable[NDArray[Any]]) -> Words:
    """The words of example rows (F, E), -1 for none, of the rows (R,) of windows, and of further token ids."""
    column = cache.column("token_id")
    ids = column[np.where(top >= 0, top, 0).ravel()].reshape(top.shape).astype(np.int64)
    of_windows = column[rows].astype(np.int64)
    known = np.unique(np.concatenate([ids[top >= 0], of_windows, *(each.ravel() for each in others)]))
    places = np.where(top >= 0, np.searchsorted(known, ids) + 1, 0)
    blocks = [most_frequent(places[start : start + BLOCK], N_LABELS) for start in range(0, len(places), BLOCK)]
    vocabulary = cache.vocabulary or []
    tokens = [vocabulary[i] if 0 <= i < len(vocabulary) else f"#{i}" for i in known.tolist()]
    texts = [printable(text) for text in displayed(tokens, vocabulary)]
    return Words(
        texts, known, np.concatenate(blocks).astype(np.uint32), np.searchsorted(known, of_windows).astype(np.uint32)
    )


def words_of_texts(cache: Cache, top: I64) -> Words:
    """Words for pooled rows: the beginning of the document with the strongest activation labels a latent."""
    strongest = top[:, 0]
    doc_ids = cache.column("doc_id")[np.where(strongest >= 0, strongest, 0)].astype(np.int64)
    known = np.unique(doc_ids[strongest >= 0])
    found = [cache.find_document(doc_id) for doc_id in known.tolist()]
    texts = [shortened(document.text, LABEL_CHARACTERS) if document else "" for document in found]
    words = no_words(len(top))
    words.labels[:, 0] = np.where(strongest >= 0, np.searchsorted(known, doc_ids) + 1, 0)
    return Words(texts, known, words.labels, words.stream)


def most_frequent(places: I64, n: int) -> I64:
    """(m, n) of each row (m, E) the most frequent positive numbers, the earlier first among equal ones; 0 for none."""
    same = places[:, :, None] == places[:, None, :]
    earlier = np.tril(np.ones(same.shape[1:], np.bool_), -1)
    first = ~(same & earlier).any(2) & (places > 0)
    order = np.argsort(-np.where(first, same.sum(2), 0), axis=1, kind="stable")[:, :n]
    found = np.take_along_axis(np.where(first, places, 0), order, axis=1)
    return np.pad(found, ((0, 0), (0, n - found.shape[1])))


def shortened(text: str, n: int) -> str:
    """A text in one line of at most n characters, with control characters escaped."""
    line = " ".join(text.split())
    return printable(line if len(line) <= n else line[: n - 1] + "\u2026")
