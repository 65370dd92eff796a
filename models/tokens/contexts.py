"""Rules by which text is cut into contexts, contexts, and sort buffers of them.

Shapes: T tokens of a context, N rows (real tokens) of a sort buffer. A context is what the model sees at once: special
tokens in front, a piece of a document (or of several, packed), special tokens after it. Every context has the special
tokens; each other token of a document is in exactly one context. In code and in the cache a context is called window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from sae_granary.common.rows import FLAG_CONTROL, FLAG_SPECIAL, FLAG_WINDOW_START, DocumentRow
from sae_granary.models.tokens.document import SKIP_REASONS, Document

IntArray = npt.NDArray[np.int32]
Tokenize = Callable[[Sequence[str]], Sequence[IntArray]]  # texts -> token ids without special tokens


@dataclass(frozen=True)
class WindowRules:
    """How token sequences are cut."""

    ctx_len: int  # tokens of a window, special ones included
    prefix: tuple[int, ...] = ()  # special tokens in front of each window
    suffix: tuple[int, ...] = ()  # and behind it
    separator: int | None = None  # packing: stands behind each document; None: a window holds one document
    special_ids: frozenset[int] = frozenset()  # ids that count as special wherever they occur
    control_ids: frozenset[int] = frozenset()  # others that the tokenizer marks as special: control tokens of a chat

    @property
    def room(self) -> int:
        """Tokens of a document that fit in a window."""
        return self.ctx_len - len(self.prefix) - len(self.suffix)

    @cached_property
    def around(self) -> tuple[IntArray, IntArray]:
        """Prefix and suffix as arrays."""
        return np.array(self.prefix, np.int32), np.array(self.suffix, np.int32)

    @cached_property
    def flag_table(self) -> npt.NDArray[np.uint8]:
        """Flags of an id wherever it occurs; the last entry is that of all larger ids."""
        table = np.zeros(max(self.special_ids | self.control_ids, default=-1) + 2, np.uint8)
        table[list(self.special_ids)] = FLAG_SPECIAL
        table[list(self.control_ids)] = FLAG_SPECIAL | FLAG_CONTROL
        return table


@dataclass(frozen=True)
class Window:
    """One sequence for the model; arrays of length T."""

    number: int  # counted over the harvest
    ids: IntArray
    doc_id: npt.NDArray[np.int64]
    doc_position: IntArray  # -1 for special tokens added here
    flags: npt.NDArray[np.uint8]
    documents: tuple[DocumentRow, ...]  # the documents whose first row is in this window

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class StreamState:
    """Position in the stream of contexts, sufficient to continue from it in another process."""

    next_doc: int = 0
    token_offset: int = 0  # tokens of next_doc (its separator counted) that are in earlier windows
    next_window: int = 0
    n_rows: int = 0
    n_docs: int = 0  # documents with rows
    repaired: int = 0  # documents with replaced bytes or surrogates
    skipped: tuple[int, ...] = (0,) * len(SKIP_REASONS)

    def to_ints(self) -> dict[str, int]:
        """As the integers that the cache's cursor stores."""
        flat = {name: getattr(self, name) for name in _PLAIN_FIELDS}
        return flat | {f"skipped_{reason}": n for reason, n in self.skip_counts.items()}

    @property
    def skip_counts(self) -> dict[str, int]:
        """Reason -> how many records were skipped for it."""
        return dict(zip(SKIP_REASONS, self.skipped, strict=True))

    @staticmethod
    def from_ints(values: dict[str, int]) -> StreamState:
        """The inverse of `to_ints`."""
        skipped = tuple(values.get(f"skipped_{reason}", 0) for reason in SKIP_REASONS)
        return StreamState(**{name: values[name] for name in _PLAIN_FIELDS}, skipped=skipped)

    def skip(self, document: Document, reason: str) -> StreamState:
        """Past a document that has no rows."""
        counts = tuple(n + (name == reason) for name, n in zip(SKIP_REASONS, self.skipped, strict=True))
        return replace(self, next_doc=document.doc_id + 1, skipped=counts)


_PLAIN_FIELDS = ("next_doc", "token_offset", "next_window", "n_rows", "n_docs", "repaired")


@dataclass(frozen=True)
class Buffer:
    """Windows that are sorted together, with the state of the stream before the first of them."""

    state: StreamState
    windows: tuple[Window, ...]

    @cached_property
    def n_rows(self) -> int:
        """N."""
        return sum(len(window) for window in self.windows)


def make_window(
    number: int,
    ids: IntArray,
    doc_id: npt.NDArray[np.int64],
    doc_position: npt.NDArray[np.int64],
    documents: tuple[DocumentRow, ...],
    rules: WindowRules,
) -> Window:
    """Special tokens around a piece; they belong to the first and last document in it."""
    start, stop = len(rules.prefix), len(rules.prefix) + len(ids)
    out_ids = np.concatenate((rules.around[0], ids, rules.around[1]), dtype=np.int32)
    flags = rules.flag_table.take(out_ids, mode="clip")
    out_doc, position = np.empty(len(out_ids), np.int64), np.full(len(out_ids), -1, np.int32)
    out_doc[:start], out_doc[start:stop], out_doc[stop:] = doc_id[0], doc_id, doc_id[-1]
    position[start:stop] = doc_position
    flags[position < 0] |= FLAG_SPECIAL
    flags[0] |= FLAG_WINDOW_START
    return Window(number, out_ids, out_doc, position, flags, documents)
