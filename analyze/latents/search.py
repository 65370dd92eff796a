"""Documents by the activation of one latent, and the values of a kept column that it prefers. Pure functions.

Shapes: M documents with a row that counts (see `CountedFlags`), of F = d_sae latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sae_granary.analyze.counted_rows import CountedFlags
from sae_granary.analyze.encoding.codes import StoredCodes
from sae_granary.analyze.latents.labels import document_labels, value_label
from sae_granary.cache.read.reader import Cache
from sae_granary.common.rows import FLAG_SPECIAL, Scalar

BLOCK_ROWS = 1 << 20
TEXT_CHARACTERS = 100  # shown of a document


@dataclass(frozen=True)
class Found:
    """The pooled activation of a latent in each document."""

    doc_id: NDArray[np.int64]  # (M,) ascending
    n_rows: NDArray[np.int64]  # (M,) rows of each that count; see `CountedFlags`
    pooled: NDArray[np.float64]  # (M,) 0 where the latent is not active

    @property
    def active(self) -> NDArray[np.bool_]:
        """(M,) whether the latent is active on any row."""
        active: NDArray[np.bool_] = self.pooled != 0
        return active

    def strongest(self, n: int) -> NDArray[np.int64]:
        """Indices of the up to n active documents with the largest pooled activation by magnitude; ties in order."""
        order = np.argsort(-np.abs(self.pooled), kind="stable")[:n]
        places: NDArray[np.int64] = order[self.active[order]]
        return places


@dataclass(frozen=True)
class Group:
    """The documents with one value of a kept column."""

    value: Scalar
    n_documents: int
    share_active: float  # of its documents, those in which the latent is active
    mean: float  # of the pooled activation over all its documents
    lift: float  # share_active over the share of all documents; 0 where the latent is active nowhere


def pool_latent(cache: Cache, codes: StoredCodes, latent: int, pool: str = "max") -> Found:
    """The pooled activation of a latent per document: one column of `pool_documents`."""
    doc_id, n_rows = _documents(cache)
    rows, values = codes.latent(latent)
    plain = CountedFlags(cache)[rows] & FLAG_SPECIAL == 0
    place, values = np.searchsorted(doc_id, cache.column("doc_id")[rows[plain]]), values[plain]
    pooled = np.zeros(len(doc_id))
    if pool == "max":
        order = np.argsort(np.abs(values), kind="stable")  # the last assignment to a place stays
        pooled[place[order]] = values[order]
    else:
        np.add.at(pooled, place, values)
        pooled /= n_rows if pool == "mean" else 1
    return Found(doc_id, n_rows, pooled)


def groups(found: Found, ids: Sequence[int], column: Sequence[Scalar]) -> list[Group]:
    """The values of a kept column (for documents `ids`, ascending), by descending lift, then number of documents."""
    place = np.searchsorted(found.doc_id, ids)
    there = np.isin(ids, found.doc_id)
    members: dict[tuple[type, Scalar], list[int]] = {}  # with its type: True is no 1
    for here, i, value in zip(there.tolist(), place.tolist(), column, strict=True):
        if here:
            members.setdefault((type(value), value), []).append(i)
    share = float(found.active.mean()) if len(found.doc_id) else 0.0
    out = []
    for (_, value), places in members.items():
        active = float(found.active[places].mean())
        lift = active / share if share else 0.0
        out.append(Group(value, len(places), active, float(found.pooled[places].mean()), lift))
    return sorted(out, key=lambda group: (-group.lift, -group.n_documents))


def group_lines(by: str, all_groups: Sequence[Group], top: int) -> Iterator[str]:
    """A table of a column's first values."""
    shown = all_groups[:top]
    head = value_label(by)
    width = max(len(cell) for cell in [head, *(value_label(group.value) for group in shown)])
    yield f"{head:<{width}}  documents  active   mean     lift"
    for group in shown:
        numbers = f"{group.n_documents:>9,}  {group.share_active:>6.1%}  {group.mean:>7.3g}  {group.lift:>7.2f}"
        yield f"{value_label(group.value):<{width}}  {numbers}"
    if more := len(all_groups) - len(shown):
        yield f"and {more:,} more value{'s' if more > 1 else ''}"


def document_lines(cache: Cache, found: Found, top: int) -> Iterator[str]:
    """The documents with the largest pooled activation: the activation, kept columns, beginning of the text."""
    for i in found.strongest(top).tolist():
        document = cache.find_document(int(found.doc_id[i]))
        text = document.text if document else ""
        shown = " ".join(text[: 10 * TEXT_CHARACTERS].split())[:TEXT_CHARACTERS]
        yield "  ".join([f"{found.pooled[i]:8.3f}", *document_labels(document), shown])


def summary_line(found: Found, latent: int, pool: str) -> str:
    """The number of documents in which a latent is active."""
    n, active = len(found.doc_id), int(found.active.sum())
    return f"latent {latent}: active in {active:,} of {n:,} documents ({active / max(n, 1):.2%}), pooled by {pool}"


def _documents(cache: Cache) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(ids, numbers of counted rows) of the documents that have counted rows."""
    parts, flags = [], CountedFlags(cache)
    for start in range(0, cache.n_rows, BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        plain = flags[block] & FLAG_SPECIAL == 0
        parts.append(np.unique(cache.column("doc_id")[block][plain], return_counts=True))
    ids, place = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)
    counts = np.zeros(len(ids), np.int64)
    np.add.at(counts, place, np.concatenate([part[1] for part in parts]))
    return ids, counts
