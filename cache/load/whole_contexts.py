"""Whole contexts, as harvested or shuffled: what a model saw, token by token, for losses through it.

The shuffled loader gives rows; a language model needs the sequences that they came from. A context is read back from
the rows' metadata alone: no activation is touched. Rows that the filters or the split leave out stay in their context,
since the model saw them; `keep` is False for them.

Shapes: S contexts of a batch, T tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sae_granary.cache.errors import SelectionError
from sae_granary.cache.load.context_order import ContextOrder
from sae_granary.cache.load.selection import TRAIN_ROWS, Selection
from sae_granary.common.rows import FLAG_SPECIAL

if TYPE_CHECKING:
    from sae_granary.cache.read.reader import Cache


@dataclass(frozen=True)
class ContextsState:
    """The position of a reader; `cache.load.context_order` says what the cursor counts."""

    epoch: int = 0
    cursor: int = 0


@dataclass(frozen=True, eq=False)
class Contexts:
    """S contexts, padded at the end to T tokens; column t is position t of its context."""

    token_id: NDArray[np.int64]  # (S, T) 0 behind the end of a context
    real: NDArray[np.bool_]  # (S, T) False behind the end of a context
    special: NDArray[np.bool_]  # (S, T) special tokens
    doc_id: NDArray[np.int64]  # (S, T) -1 behind the end; a packed context holds several documents
    keep: NDArray[np.bool_]  # (S, T) rows of the wanted part that the filters leave
    row: NDArray[np.int64]  # (S, T) ordinal of the row in the opened cache, -1 behind the end
    state: ContextsState  # where the reader stands after them

    def __len__(self) -> int:
        return len(self.token_id)

    @property
    def n_rows(self) -> int:
        """Kept rows."""
        return int(np.count_nonzero(self.keep))

    def split(self, n_parts: int) -> Iterator[Contexts]:
        """At most n parts of about equally many contexts, each as wide as its longest."""
        for part in np.array_split(np.arange(len(self)), min(n_parts, len(self))):
            width = int(self.real[part].sum(1).max())
            arrays = {name: getattr(self, name)[part, :width] for name in _ARRAYS}
            yield Contexts(**arrays, state=self.state)


_ARRAYS = ("token_id", "real", "special", "doc_id", "keep", "row")
_FILL = {"token_id": 0, "real": False, "special": False, "doc_id": -1, "keep": False, "row": -1}


def read_contexts(
    cache: Cache,
    hook: str | None = None,
    *,
    batch_rows: int,
    selection: Selection = TRAIN_ROWS,
    state: ContextsState | None = None,
    epochs: int | None = None,
    seed: int | None = None,
) -> Iterator[Contexts]:
    """Batches of whole contexts with at most `batch_rows` kept rows (a context that holds more is a separate batch).

    Contexts without a kept row are stepped over. Batches follow one another over the end of a pass: forever, or for
    `epochs` passes. Contexts come as harvested, or, with a `seed`, each pass in another permutation. The same
    arguments and the state of an earlier batch continue exactly after it; seeking and memory cost O(262,144 rows).
    The norms that filters may look at are those of `hook`.
    Raises SelectionError for a cache without contexts (`unit text`), or where nothing is kept.
    """
    if cache.unit != "token":
        raise SelectionError(
            f"{cache.path} holds one row per {cache.unit}, no contexts of tokens: harvest with --unit token"
        )
    if batch_rows < 1:
        raise SelectionError(f"a batch of contexts is {batch_rows} rows, expected at least 1")
    source = _Source(cache, cache.hook_name(hook), selection.resolve(cache), seed)
    return _batches(source.contexts(state or ContextsState(), epochs), batch_rows)


@dataclass(frozen=True, eq=False)
class _Context:
    """One context: arrays (T,) by name, and the state after it."""

    arrays: dict[str, NDArray[Any]]
    n_kept: int
    state: ContextsState


class _Source:
    """Contexts one by one."""

    def __init__(self, cache: Cache, hook: str, selection: Selection, seed: int | None) -> None:
        self.cache, self.selection = cache, selection
        self.order = ContextOrder(cache, (hook,), selection, seed)

    def contexts(self, state: ContextsState, epochs: int | None) -> Iterator[_Context]:
        """Contexts with kept rows from a state on."""
        epoch, cursor = state.epoch, state.cursor
        while epochs is None or epoch < epochs:
            nothing = True
            for shard, start, end, behind in self.order.contexts(epoch, cursor):
                nothing = False
                yield self._context(shard, start, end, ContextsState(*behind))
            if cursor == 0 and nothing:
                raise SelectionError(f"{self.cache.path}: {_nothing_left(self.selection)}")
            epoch, cursor = epoch + 1, 0

    def _context(self, shard: int, start: int, end: int, behind: ContextsState) -> _Context:
        columns = {name: self.cache.column(name).shard(shard)[start:end] for name in ("token_id", "doc_id", "flags")}
        offset, keep = int(self.cache.starts[shard]), self.order.keep(shard, start, end)
        arrays: dict[str, NDArray[Any]] = {
            "token_id": columns["token_id"].astype(np.int64),
            "real": np.ones(end - start, np.bool_),
            "special": (columns["flags"] & FLAG_SPECIAL) != 0,
            "doc_id": np.asarray(columns["doc_id"]),
            "keep": keep,
            "row": np.arange(offset + start, offset + end),
        }
        return _Context(arrays, int(np.count_nonzero(keep)), behind)


def _nothing_left(selection: Selection) -> str:
    """Why no context is delivered, and what to do."""
    part, holdout = selection.part, selection.holdout
    remedy = "loosen the filters, or hold out fewer documents"
    if part == "heldout":
        remedy = "hold out more documents, holdout=Holdout(0.2), or read part='train'"
    held_out = f"{holdout.fraction:.3g} of the documents are held out, by seed {holdout.seed}"
    return f"no context has a row of the {part} part left ({held_out}); {remedy}"


def _batches(contexts: Iterator[_Context], batch_rows: int) -> Iterator[Contexts]:
    open_contexts: list[_Context] = []
    n_rows = 0
    for context in contexts:
        if open_contexts and n_rows + context.n_kept > batch_rows:
            yield _pad(open_contexts)
            open_contexts, n_rows = [], 0
        open_contexts.append(context)
        n_rows += context.n_kept
    if open_contexts:
        yield _pad(open_contexts)


def _pad(contexts: Sequence[_Context]) -> Contexts:
    width = max(len(context.arrays["real"]) for context in contexts)
    padded = {}
    for name in _ARRAYS:
        first = contexts[0].arrays[name]
        padded[name] = np.full((len(contexts), width), _FILL[name], first.dtype)
        for i, context in enumerate(contexts):
            padded[name][i, : len(context.arrays[name])] = context.arrays[name]
    return Contexts(**padded, state=contexts[-1].state)
