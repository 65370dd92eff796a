"""The sort buffers of a harvest, from where its cache ends or from the start of any recorded buffer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sae_granary.cache.format.manifest import Manifest
from sae_granary.models.tokens.contexts import Buffer, IntArray, StreamState, WindowRules
from sae_granary.models.tokens.document import Document
from sae_granary.models.tokens.stream import WindowStream, buffers


@dataclass(frozen=True)
class Replay:
    """How a pipeline that repeats or extends the rows of a cache differs from a first harvest."""

    provenance: Mapping[str, Any] | None = None  # of the finished cache; None: as it is
    ends: Sequence[int] = ()  # documents at which earlier harvests of these rows ended
    until: int | None = None  # the last row that is wanted
    compare: bool = True  # the text with the stored documents
    begin: StreamState = field(default_factory=StreamState)  # of a harvest without committed rows


class BufferStream:
    """Iterates over sort buffers; `state` is the position reached, `ended` why it ended.

    `ends` are the numbers of documents at which earlier harvests of the cache ended, ascending. No buffer spans one, so
    that every buffer of an extended cache is made again exactly as it was. The buffer with row `until` is the last one.
    """

    def __init__(
        self,
        tokenized: Iterable[tuple[Document, IntArray]],
        rules: WindowRules,
        state: StreamState,
        *,
        ends: Sequence[int] = (),
        max_rows: int | None = None,
        max_docs: int | None = None,
        until: int | None = None,
    ) -> None:
        self._tokenized, self._rules, self._until = iter(tokenized), rules, until
        self._limits = [(None, end) for end in ends if end >= state.n_docs] + [(max_rows, max_docs)]
        self._window_stream = WindowStream(self._tokenized, rules, state)

    def close(self) -> None:
        """End what reads ahead; after an error another thread may be in the middle of it, and ends with the process."""
        if close := getattr(self._tokenized, "close", None):
            with contextlib.suppress(ValueError):
                close()

    @property
    def state(self) -> StreamState:
        """After the last context."""
        return self._window_stream.state

    @property
    def ended(self) -> str:
        """max_tokens, max_docs or source; empty while it runs."""
        return self._window_stream.ended

    def buffers(self, buffer_tokens: int) -> Iterator[Buffer]:
        """Buffers of about so many rows; shorter where a harvest ended."""
        for max_rows, max_docs in self._limits:
            self._window_stream = WindowStream(
                self._tokenized, self._rules, self.state, max_rows=max_rows, max_docs=max_docs
            )
            for buffer in buffers(self._window_stream, buffer_tokens):
                yield buffer
                if self._until is not None and buffer.state.n_rows + buffer.n_rows >= self._until:
                    return


def recorded_ends(manifest: Manifest) -> tuple[int, ...]:
    """The numbers of documents at which the harvests of a complete cache ended; none of one that is unfinished.

    Of a cache in blocks none either: each block is a harvest that ended once.
    """
    if manifest.block_docs is not None:
        return ()
    summaries = (*manifest.extended, manifest.summary) if manifest.summary is not None else ()
    return tuple(int(summary["n_documents"]) for summary in summaries)
