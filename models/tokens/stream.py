"""Document -> Window -> sort buffer: one pass over the documents, and a state to continue from.

Shapes: T tokens of a window, N rows (real tokens) of a sort buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from sae_granary.common.rows import DocumentRow
from sae_granary.common.threads import Prefetch
from sae_granary.models.tokens.contexts import Buffer, IntArray, StreamState, Tokenize, Window, WindowRules, make_window
from sae_granary.models.tokens.document import Document

TOKENIZE_DOCS = 256  # documents tokenized in one call
TOKENIZE_CHARS = 1 << 20  # ... or fewer, when together they are longer than this

Tokenized = tuple[Document, IntArray]


def tokenize_stream(docs: Iterable[Document], tokenize: Tokenize) -> Iterator[Tokenized]:
    """Documents with their token ids; skipped ones with none. Texts go to the tokenizer in batches."""
    for batch in tokenize_batches(docs, tokenize):
        yield from batch


def tokenize_ahead(docs: Iterable[Document], tokenize: Tokenize) -> Iterator[Tokenized]:
    """The same by a separate thread, since a fast tokenizer leaves the interpreter to other threads."""
    with Prefetch(tokenize_batches(docs, tokenize), 2) as ahead:
        for batch in ahead:
            yield from batch


def tokenize_batches(docs: Iterable[Document], tokenize: Tokenize) -> Iterator[list[Tokenized]]:
    """The same by the batches that are tokenized in one call: as many documents keep all cores at work."""
    batch: list[Document] = []
    chars = 0
    for document in docs:
        batch.append(document)
        chars += len(document.text)
        if len(batch) == TOKENIZE_DOCS or chars >= TOKENIZE_CHARS:
            yield _tokenize_batch(batch, tokenize)
            batch, chars = [], 0
    yield _tokenize_batch(batch, tokenize)


def _tokenize_batch(batch: list[Document], tokenize: Tokenize) -> list[Tokenized]:
    wanted = [document.text for document in batch if document.skipped is None]
    tokens = iter(tokenize(wanted) if wanted else ())
    empty = np.empty(0, np.int32)
    return [(document, next(tokens) if document.skipped is None else empty) for document in batch]


@dataclass
class WindowStream:
    """Cut tokenized documents into contexts, with a resumable position after each.

    `max_rows` and `max_docs` end the stream after the document that reaches them.
    """

    tokenized: Iterable[tuple[Document, IntArray]]  # from document state.next_doc on
    rules: WindowRules
    state: StreamState = field(default_factory=StreamState)
    max_rows: int | None = None
    max_docs: int | None = None
    ended: str = ""  # why the stream ended: "max_tokens", "max_docs", "source"; empty while it runs

    def __iter__(self) -> Iterator[Window]:
        return self._packed() if self.rules.separator is not None else self._single()

    def _single(self) -> Iterator[Window]:
        tokenized = iter(self.tokenized)
        while not self._full(pending=0):
            if (item := next(tokenized, None)) is None:
                self.ended = "source"
                return
            document, ids = item
            if self._skipped(document, ids):
                continue
            self._begin(document)
            first = self.state.token_offset
            for start in range(first, len(ids), self.rules.room):
                piece = ids[start : start + self.rules.room]
                end = start + len(piece)
                rows = () if start else (_document_row(document),)
                of_piece = np.full(len(piece), document.doc_id), np.arange(start, end)
                window = make_window(self.state.next_window, piece, *of_piece, rows, self.rules)
                self._emit(window, document.doc_id + (end == len(ids)), 0 if end == len(ids) else end)
                yield window

    def _packed(self) -> Iterator[Window]:
        tokenized = iter(self.tokenized)
        parts = _Parts()
        while not self._full(pending=parts.n + (len(self.rules.prefix) if parts.n else 0)):
            if (item := next(tokenized, None)) is None:
                self.ended = "source"
                break
            document, ids = item
            if self._skipped(document, ids):
                continue
            self._begin(document)
            ids = np.append(ids, np.int32(self.rules.separator or 0))
            start = self.state.token_offset
            while start < len(ids):
                end = min(len(ids), start + self.rules.room - parts.n)
                parts.add(document, ids, start, end)
                start = end
                if parts.n == self.rules.room:
                    done = end == len(ids)
                    window = parts.window(self.state.next_window, self.rules)
                    self._emit(window, document.doc_id + done, 0 if done else end)
                    yield window
                    parts = _Parts()
            if parts.n:
                self.state = replace(self.state, next_doc=document.doc_id + 1, token_offset=0)
        if parts.n:
            window = parts.window(self.state.next_window, self.rules)
            self._emit(window, self.state.next_doc, 0)
            yield window

    def _skipped(self, document: Document, ids: IntArray) -> bool:
        reason = document.skipped or ("" if len(ids) else "no_tokens")
        if reason:
            self.state = self.state.skip(document, reason)
        return bool(reason)

    def _begin(self, document: Document) -> None:
        if (s := self.state).token_offset == 0:
            found = (s.n_docs + 1, s.repaired + document.repaired)
            self.state = StreamState(s.next_doc, 0, s.next_window, s.n_rows, *found, s.skipped)

    def _emit(self, window: Window, next_doc: int, token_offset: int) -> None:
        s, n_rows = self.state, self.state.n_rows + len(window)
        self.state = StreamState(next_doc, token_offset, window.number + 1, n_rows, s.n_docs, s.repaired, s.skipped)

    def _full(self, pending: int) -> bool:
        if self.state.token_offset:  # in the middle of a document: it is finished first
            return False
        if self.max_rows is not None and self.state.n_rows + pending >= self.max_rows:
            self.ended = "max_tokens"
        elif self.max_docs is not None and self.state.n_docs >= self.max_docs:
            self.ended = "max_docs"
        return bool(self.ended)


@dataclass
class _Parts:
    """The open window of a packed stream."""

    ids: list[IntArray] = field(default_factory=list)
    doc_id: list[npt.NDArray[np.int64]] = field(default_factory=list)
    doc_position: list[npt.NDArray[np.int64]] = field(default_factory=list)
    documents: list[DocumentRow] = field(default_factory=list)
    n: int = 0

    def add(self, document: Document, ids: IntArray, start: int, end: int) -> None:
        """Tokens start..end of a document; the last of `ids` is its separator."""
        position = np.arange(start, end)
        position[position == len(ids) - 1] = -1
        self.ids.append(ids[start:end])
        self.doc_id.append(np.full(end - start, document.doc_id))
        self.doc_position.append(position)
        if start == 0:
            self.documents.append(_document_row(document))
        self.n += end - start

    def window(self, number: int, rules: WindowRules) -> Window:
        """The collected tokens as a context."""
        return make_window(
            number,
            np.concatenate(self.ids),
            np.concatenate(self.doc_id),
            np.concatenate(self.doc_position),
            tuple(self.documents),
            rules,
        )


def buffers(stream: WindowStream, buffer_tokens: int) -> Iterator[Buffer]:
    """Windows in sort buffers of about `buffer_tokens` rows, each with the state before it."""
    state, windows, n = stream.state, [], 0
    for window in stream:
        windows.append(window)
        n += len(window)
        if n >= buffer_tokens:
            yield Buffer(state, tuple(windows))
            state, windows, n = stream.state, [], 0
    if windows:
        yield Buffer(state, tuple(windows))


def _document_row(document: Document) -> DocumentRow:
    return DocumentRow(document.doc_id, document.source, document.row, document.text, document.columns)
