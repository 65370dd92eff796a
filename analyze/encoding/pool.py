"""One row of codes per document: the maximum, mean or sum of each latent over the document's tokens.

Shapes: N rows of a block, M documents, E entries (document, latent), F = d_sae.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sae_granary.analyze.encoding.blocks import CodeBlock


def pool_documents(blocks: Iterable[CodeBlock], d_sae: int, how: str) -> Iterator[CodeBlock]:
    """Blocks of rows -> blocks of documents; special tokens are left out. The documents of the rows must ascend.

    The maximum is the activation of the largest magnitude, the mean is over all tokens of a document, active or not. A
    document without active latents is an empty row. Sums are in float64. A document may span any number of blocks:
    memory holds one block, and the latents of one document.
    """
    held: _Partial | None = None
    for block in blocks:
        part = _of_rows(block, d_sae, how)
        if held is not None:
            part = _merged(held, part, d_sae, how)
        if len(part.doc_ids):
            last = len(part.doc_ids) - 1
            cut = int(np.searchsorted(part.document, last))
            held = part.slice(last, last + 1, cut, len(part.document))
            if last:
                yield _finished(part.slice(0, last, 0, cut), how)
    if held is not None:
        yield _finished(held, how)


@dataclass(frozen=True, eq=False)
class _Partial:
    """Documents of which more rows may come."""

    doc_ids: NDArray[np.int64]  # (M,)
    n_rows: NDArray[np.int64]  # (M,) rows so far
    document: NDArray[np.int64]  # (E,) ascending: which of the M documents
    latent: NDArray[np.int64]  # (E,) ascending within a document
    value: NDArray[np.float64]  # (E,) sum, or maximum

    def slice(self, first: int, last: int, start: int, stop: int) -> _Partial:
        """Documents first..last, whose entries are start..stop."""
        part = slice(start, stop)
        ids, n_rows, document = self.doc_ids[first:last], self.n_rows[first:last], self.document[part] - first
        return _Partial(ids, n_rows, document, self.latent[part], self.value[part])

    def reduced(self, d_sae: int, how: str) -> _Partial:
        """One entry per document and latent, in order."""
        keys = self.document * d_sae + self.latent
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        if not len(first):
            return self
        value = self.value[order]
        if how == "max":
            high, low = np.maximum.reduceat(value, first), np.minimum.reduceat(value, first)
            value = np.where(-low > high, low, high)
        else:
            value = np.add.reduceat(value, first)
        return _Partial(self.doc_ids, self.n_rows, keys[first] // d_sae, keys[first] % d_sae, value)


def _of_rows(block: CodeBlock, d_sae: int, how: str) -> _Partial:
    doc_ids, group = np.unique(block.doc_ids, return_inverse=True)
    plain = ~block.special
    n_rows = np.bincount(group[plain], minlength=len(doc_ids))
    kept = np.repeat(plain, block.counts)
    document, latent = np.repeat(group, block.counts)[kept], block.indices[kept].astype(np.int64)
    return _Partial(doc_ids, n_rows, document, latent, block.values[kept].astype(np.float64)).reduced(d_sae, how)


def _merged(first: _Partial, second: _Partial, d_sae: int, how: str) -> _Partial:
    """Merge a document that may continue in later blocks with the documents after it."""
    same = len(second.doc_ids) > 0 and first.doc_ids[0] == second.doc_ids[0]
    n_rows = np.concatenate([first.n_rows, second.n_rows])
    doc_ids = np.concatenate([first.doc_ids, second.doc_ids])
    if same:
        n_rows, doc_ids = n_rows[1:].copy(), doc_ids[1:]
        n_rows[0] += first.n_rows[0]
    return _Partial(
        doc_ids,
        n_rows,
        np.concatenate([first.document, second.document + (not same)]),
        np.concatenate([first.latent, second.latent]),
        np.concatenate([first.value, second.value]),
    ).reduced(d_sae, how)


def _finished(part: _Partial, how: str) -> CodeBlock:
    value = part.value / part.n_rows[part.document] if how == "mean" else part.value
    values = value.astype(np.float32)
    kept = values != 0
    counts = np.bincount(part.document[kept], minlength=len(part.doc_ids))
    special = np.zeros(len(part.doc_ids), bool)
    return CodeBlock(counts, part.latent[kept].astype(np.int32), values[kept], part.doc_ids, special)
