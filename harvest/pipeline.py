"""Stages that overlap, from documents to committed shards.

source -> documents -> windows -> sort buffers     (a thread: tokenizer and batches)
       -> forward pass to the last hook point      (the main thread)
       -> casts, sums, copy to the host            (on a GPU a thread and a stream)
       -> cache writer                             (a thread)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from sae_granary.cache.write.writer import CacheWriter
from sae_granary.common.threads import Background, Prefetch
from sae_granary.harvest.device.host import HostCopier, OnHost, Places, documents_from, timed_event, to_rows
from sae_granary.harvest.errors import HarvestError, NoRowsError
from sae_granary.harvest.prepare import Prepared
from sae_granary.harvest.progress import Progress, RunLog
from sae_granary.harvest.replay.one_shard import Unwritten
from sae_granary.harvest.replay.stream import BufferStream, Replay
from sae_granary.harvest.result import HarvestResult, ending_warnings, result_of
from sae_granary.harvest.spec import not_recorded
from sae_granary.harvest.text.committed import continued
from sae_granary.harvest.text.document import skipped_counts
from sae_granary.models.forward import Tick, Work, first_rows
from sae_granary.models.tokens.contexts import Buffer, StreamState
from sae_granary.models.tokens.stream import tokenize_ahead, tokenize_stream

if TYPE_CHECKING:
    import torch

STAGES = ("tokenizer", "model", "copy", "write")
STAGED = ("cuda",)  # devices that cast, sum and copy while the model runs


class Model(Protocol):
    """What turns buffers into activations: TokenModel or TextModel."""

    device: torch.device

    def prepare(self, buffer: Buffer) -> Work:
        """Batches of a buffer."""

    def __call__(self, work: Work, tick: Tick) -> dict[str, torch.Tensor]:
        """Activations of its rows, in source order."""


@dataclass
class _Meter:
    """Working seconds of each stage, and places with their padding."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    rows: int = 0
    places: int = 0

    def add(self, stage: str, start: float) -> None:
        self.seconds[stage] += time.perf_counter() - start


@dataclass(frozen=True)
class _Done:
    """A buffer with its activations on the device."""

    buffer: Buffer
    activations: dict[str, torch.Tensor]
    begun: Any  # CUDA event before the first batch; None on a CPU
    ready: Any  # and after the last one


@dataclass(frozen=True)
class _Copied:
    """A buffer with its activations on the host."""

    buffer: Buffer
    host: OnHost
    n_committed: int  # rows of it that an earlier run committed


class Pipeline:
    """One run of the stages."""

    def __init__(
        self,
        prepared: Prepared,
        model: Model,
        writer: CacheWriter | Unwritten,
        progress: Progress,
        log: RunLog,
        check: Callable[[], None],
        replay: Replay = Replay(),  # noqa: B008
    ) -> None:
        self._prepared, self._model, self._writer = prepared, model, writer
        self._progress, self._log, self._check, self._replay = progress, log, check, replay
        self._meter, self._staged = _Meter(), model.device.type in STAGED
        cursor = writer.cursor
        self._skip = cursor.rows_into_buffer if cursor is not None else 0
        self._stream = self._open_stream(replay.begin if cursor is None else StreamState.from_ints(dict(cursor.source)))
        self._resumed_rows = writer.n_rows
        self._copier = HostCopier(model.device, writer.layout, progress.say, staged=self._staged)
        self._places = Places(prepared.rows_per_shard)
        self._warnings: list[str] = []

    def run(self) -> HarvestResult:
        """All the way to a complete cache."""
        writer, start = self._writer, time.perf_counter()
        assert isinstance(writer, CacheWriter)
        self.fill()
        begin = time.perf_counter()
        if writer.n_rows == 0:
            source = self._prepared.source
            raise NoRowsError(source.name, skipped_counts(self._stream.state.skip_counts), source.columns)
        writer.finish(self.summary(), self._replay.provenance)
        self._warn(writer.warnings[len(self._warnings) :])
        self._meter.add("write", begin)
        return self._result(writer, time.perf_counter() - start)

    def fill(self) -> None:
        """Give the writer all rows that are wanted."""
        self._progress.begin(self._resumed_rows)
        with contextlib.ExitStack() as stages:
            write: Callable[[_Copied], None] = self._write
            if self._staged:
                write = stages.enter_context(Background(self._write, self._check)).submit
            copying = stages.enter_context(Background[_Done](lambda done: write(self._copy(done)), self._check))
            stages.callback(self._stream.close)
            prefetch = stages.enter_context(Prefetch(self._work(), 2, self._check))
            for work in prefetch:
                copying.submit(self._encode(work))
        self._meter.seconds["tokenizer"] = prefetch.busy

    def _open_stream(self, state: StreamState) -> BufferStream:
        prepared, committed = self._prepared, self._writer.committed
        options = {"compare": self._replay.compare and committed.n_shards > 0}
        docs = continued(
            prepared.source, self._writer.path, state.next_doc, prepared.render, prepared.tokenize, **options
        )
        max_rows, max_docs = prepared.config.max_tokens, prepared.config.max_docs
        return BufferStream(
            (tokenize_ahead if self._staged else tokenize_stream)(docs, prepared.tokenize),
            prepared.rules,
            state,
            ends=self._replay.ends,
            until=self._replay.until,
            max_rows=max_rows and max(max_rows, committed.n_rows),  # the document of the last committed row ends it
            max_docs=max_docs and max(max_docs, committed.n_documents),
        )

    def _work(self) -> Iterator[Work]:
        for buffer in self._stream.buffers(self._prepared.buffer_tokens):
            if buffer.n_rows == self._skip:  # all committed: the model need not see it
                self._skip = 0
                continue
            yield self._model.prepare(buffer)

    def _encode(self, work: Work) -> _Done:
        start, begun, ready = time.perf_counter(), timed_event(self._model.device), timed_event(self._model.device)
        if begun is not None:
            begun.record()
        activations = self._model(work, self._tick)
        if ready is not None:
            ready.record()
        else:
            self._meter.add("model", start)
        self._meter.rows += work.buffer.n_rows
        self._meter.places += work.n_places
        return _Done(work.buffer, activations, begun, ready)

    def _tick(self, n_rows: int) -> None:
        self._progress.advance(n_rows, self._writer.bytes_written)
        self._check()

    def _copy(self, done: _Done) -> _Copied:
        if done.ready is not None:
            done.ready.synchronize()  # no other thread waits for the device
            self._meter.seconds["model"] += done.begun.elapsed_time(done.ready) / 1e3
        start = time.perf_counter()
        n_committed = self._committed_rows(done.buffer)
        parts = self._places.parts(done.buffer.windows, n_committed) if self._staged else ()
        copied = _Copied(done.buffer, self._copier(done.activations, parts), n_committed)
        self._meter.add("copy", start)
        return copied

    def _write(self, copied: _Copied) -> None:
        start, n_committed, windows = time.perf_counter(), copied.n_committed, copied.buffer.windows
        rows = to_rows(windows, copied.host)
        self._writer.begin_buffer(copied.buffer.state.to_ints())
        self._writer.skip(n_committed)
        if n_committed < rows.n_rows:
            self._writer.append(rows[n_committed:], documents_from(windows, n_committed))
            self._warn(self._writer.warnings[len(self._warnings) :])
        self._meter.add("write", start)

    def _committed_rows(self, buffer: Buffer) -> int:
        """How many rows of a buffer an earlier run committed: of the first one after a resume; of any other none."""
        n, self._skip = self._skip, 0
        if n not in {*first_rows(buffer), buffer.n_rows}:
            raise HarvestError(
                f"{n} rows of the sort buffer are committed, but no window ends there: the text is not the same as "
                "before; harvest to another --out"
            )
        return n

    @property
    def state(self) -> StreamState:
        """The position in the text that was reached."""
        return self._stream.state

    def summary(self) -> dict[str, Any]:
        """What the harvest has done, as the manifest of its cache holds it."""
        state = self._stream.state
        assert isinstance(self._writer, CacheWriter)
        return {
            "n_rows": state.n_rows,
            "n_documents": state.n_docs,
            "ended": self._stream.ended,
            "repaired": state.repaired,
            **({"not_compared": unknown} if (unknown := not_recorded(self._writer.manifest)) else {}),
            **{f"skipped_{reason}": n for reason, n in state.skip_counts.items()},
        }

    def _warn(self, warnings: Sequence[str]) -> None:
        self._warnings += warnings
        for warning in warnings:
            self._progress.say(f"warning: {warning}")
            self._log.write(f"warning: {warning}")

    def _result(self, writer: CacheWriter, seconds: float) -> HarvestResult:
        meter = self._meter
        busy = [(stage, spent / max(seconds, 1e-9)) for stage, spent in meter.seconds.items()]
        busy.sort(key=lambda item: -item[1])
        result = result_of(self._prepared, writer, self.summary())
        result = replace(
            result,
            resumed_rows=self._resumed_rows,
            seconds=seconds,
            rows_per_second=meter.rows / max(seconds, 1e-9),
            padding=1 - meter.rows / max(1, meter.places),
            busy=tuple(busy),
            warnings=(*self._warnings, *ending_warnings(self._prepared.config, self.summary())),
        )
        self._warn(result.warnings[len(self._warnings) :])
        self._log.write(
            f"finished: {result.n_rows:,} rows in {seconds:.1f} s, {result.rows_per_second:,.0f} rows/s, "
            + ", ".join(f"{stage} {share:.0%}" for stage, share in busy)
        )
        return result
