"""The sort buffers of a harvest, from where its cache ends or from the start of any recorded buffer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from sae_granary.cache.format.manifest import Manifest
from sae_granary.models.tokens.contexts import Buffer, IntArray, StreamState, WindowRules
from sae_granary.models.tokens.document import Document
from sae_granary.models.tokens.stream import WindowStream, buffers


class BufferStream:
    """Iterates over sort buffers; `state` and `ended` tell how far it came and why it ended.

    `ends` are the numbers of documents at which earlier harvests of the cache ended, ascending. No buffer spans one, so
    that every buffer of an extended cache is made again exactly as it was.
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
    ) -> None:
        self._tokenized, self._rules = iter(tokenized), rules
        self._limits = [(None, end) for end in ends if end >= state.n_docs] + [(max_rows, max_docs)]
        self._window_stream = WindowStream(self._tokenized, rules, state)

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
            yield from buffers(self._window_stream, buffer_tokens)


def recorded_ends(manifest: Manifest) -> tuple[int, ...]:
    """The numbers of documents at which the harvests of a complete cache ended; none of one that is unfinished."""
    summaries = (*manifest.extended, manifest.summary) if manifest.summary is not None else ()
    return tuple(int(summary["n_documents"]) for summary in summaries)
