"""Join the generators, drive the writer, continue where an earlier run stopped.

source -> documents -> windows -> sort buffers     (a thread: tokenizer and batches)
       -> forward pass to the last hook point      (the main thread)
       -> copy to the host -> cache writer         (a thread)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cache.rows import DocumentRow, Rows
from cache.writer import CacheWriter
from harvest.background import Background, Prefetch
from harvest.config import HarvestConfig
from harvest.errors import ConfigError, HarvestError
from harvest.forward import Tick, TokenModel, Work
from harvest.hooks import probe
from harvest.log import RunLog
from harvest.model import load_base
from harvest.plan import check_space
from harvest.pooled import TextModel, load_pooled, pooled_width
from harvest.prepare import Prepared, prepare
from harvest.progress import Progress
from harvest.signals import StopSignals
from harvest.text import SKIP_REASONS, documents
from harvest.tokens import Buffer, StreamState, WindowStream, buffers, tokenize_stream

if TYPE_CHECKING:
    import torch

STAGES = ("tokenizer", "model", "copy", "write")


class Model(Protocol):
    """What turns buffers into activations: TokenModel or TextModel."""

    device: torch.device

    def prepare(self, buffer: Buffer) -> Work:
        """Batches of a buffer."""

    def __call__(self, work: Work, tick: Tick) -> dict[str, torch.Tensor]:
        """Activations of its rows, in source order."""


@dataclass(frozen=True)
class HarvestResult:
    """What a harvest did."""

    path: Path
    unit: str
    hooks: tuple[tuple[str, int], ...]  # name, d_in
    dtype: str
    n_rows: int
    n_docs: int
    n_shards: int
    n_bytes: int
    ended: str  # why it ended: max_tokens, max_docs, source
    skipped: tuple[tuple[str, int], ...]
    repaired: int
    already_complete: bool = False
    resumed_rows: int = 0
    seconds: float = 0.0  # from the first batch to the last commit; loading the model is not in it
    rows_per_second: float = 0.0
    padding: float = 0.0  # share of padded places in all batches
    busy: tuple[tuple[str, float], ...] = ()  # share of the time that each stage worked, busiest first
    warnings: tuple[str, ...] = ()


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
    ready: Any  # CUDA event after the last batch; None on a CPU


def harvest(config: HarvestConfig, *, quiet: bool = False) -> HarvestResult:
    """Harvest a cache, or continue one. The function behind `sae-harvest run`."""
    with StopSignals() as signals, Progress(config.where.unit, config.max_tokens, quiet=quiet) as progress:
        prepared = prepare(config, progress.say)
        check_space(prepared)
        model: Model | None = None
        if not prepared.widths_known:
            prepared, model = load(prepared, progress.say)
        with CacheWriter.open(config.out_path, prepared.spec()) as writer:
            if writer.complete:
                return _finished(prepared, writer)
            log = RunLog(config.out_path)
            say = _both(progress.say, log.write)
            if writer.n_rows:
                say(f"continuing {config.out_path} after {writer.n_rows:,} committed rows")
            try:
                progress.say(f"loading {prepared.located.name} ({prepared.compute_dtype}, {prepared.device})")
                model = model or load(prepared, say)[1]
                signals.defer()
                return _Harvest(prepared, model, writer, progress, log, signals.check).run()
            except BaseException as error:
                log.write(f"stopped: {type(error).__name__}: {error}")
                raise
            finally:
                log.close(keep=writer.n_shards > 0)


def load(prepared: Prepared, say: Callable[[str], None]) -> tuple[Prepared, Model]:
    """The model with its weights, and the plan with the widths that it really has."""
    located, device = prepared.located, prepared.device
    if prepared.unit == "text":
        pooled = load_pooled(located, prepared.compute_dtype, device)
        hooks = (replace(prepared.hooks[0], d_in=pooled_width(pooled)),)
        max_len = int(pooled.max_seq_length or 512)
        model: Model = TextModel(
            pooled, hooks[0].d_in, device, batch_tokens=prepared.batch_tokens, max_len=max_len, say=say
        )
    else:
        base = load_base(located, prepared.compute_dtype, device)
        hooks = probe(base, prepared.hooks, device)
        pad_id = int(prepared.tokenizer.pad_token_id or 0)
        model = TokenModel(base, hooks, device, batch_tokens=prepared.batch_tokens, pad_id=pad_id, say=say)
    if prepared.widths_known and hooks != prepared.hooks:
        raise HarvestError(f"the loaded model has hook points {hooks}, its config promised {prepared.hooks}")
    return replace(prepared, hooks=hooks, widths_known=True), model


class _Harvest:
    """One run of the three stages."""

    def __init__(
        self,
        prepared: Prepared,
        model: Model,
        writer: CacheWriter,
        progress: Progress,
        log: RunLog,
        check: Callable[[], None],
    ) -> None:
        self._prepared, self._model, self._writer = prepared, model, writer
        self._progress, self._log, self._check = progress, log, check
        self._meter = _Meter()
        cursor = writer.cursor
        self._skip = cursor.rows_into_buffer if cursor is not None else 0
        self._stream = self._open_stream(
            StreamState() if cursor is None else StreamState.from_ints(dict(cursor.source))
        )
        self._resumed_rows = writer.n_rows
        self._copier = _Copier(model.device)

    def run(self) -> HarvestResult:
        """All the way to a complete cache."""
        self._progress.begin(self._resumed_rows)
        start = time.perf_counter()
        with (
            Background(self._write, self._check) as background,
            Prefetch(self._work(), 1, self._check) as prefetch,
        ):
            for work in prefetch:
                background.submit(self._encode(work))
        self._meter.seconds["tokenizer"] = prefetch.busy
        begin = time.perf_counter()
        self._writer.finish(self._summary())
        self._meter.add("write", begin)
        return self._result(time.perf_counter() - start)

    def _open_stream(self, state: StreamState) -> WindowStream:
        prepared = self._prepared
        docs = documents(prepared.source, state.next_doc, prepared.render)
        return WindowStream(
            tokenize_stream(docs, prepared.tokenize),
            prepared.rules,
            state,
            max_rows=prepared.config.max_tokens,
            max_docs=prepared.config.max_docs,
        )

    def _work(self) -> Iterator[Work]:
        for buffer in buffers(self._stream, self._prepared.buffer_tokens):
            yield self._model.prepare(buffer)

    def _encode(self, work: Work) -> _Done:
        start = time.perf_counter()
        activations = self._model(work, self._tick)
        ready = None
        if self._model.device.type == "cuda":
            import torch

            ready = torch.cuda.Event()
            ready.record()
        else:
            self._meter.add("model", start)
        self._meter.rows += work.buffer.n_rows
        self._meter.places += work.n_places
        return _Done(work.buffer, activations, ready)

    def _tick(self, n_rows: int) -> None:
        self._progress.advance(n_rows, self._writer.bytes_written)
        self._check()

    def _write(self, done: _Done) -> None:
        start = time.perf_counter()
        if done.ready is not None:
            done.ready.synchronize()  # until then the writer waits for the model
            self._meter.add("model", start)
            start = time.perf_counter()
        arrays = self._copier(done.activations)
        self._meter.add("copy", start)
        start = time.perf_counter()
        rows, documents_ = to_rows(done.buffer, arrays)
        self._writer.begin_buffer(done.buffer.state.to_ints())
        if self._skip:
            rows = self._without_committed(done.buffer, rows)
        if rows.n_rows:
            self._writer.append(rows, documents_)
        self._meter.add("write", start)

    def _without_committed(self, buffer: Buffer, rows: Rows) -> Rows:
        """The first buffer after a resume, less the rows that are committed."""
        n, self._skip = self._skip, 0
        starts = {0, *np.cumsum([len(window) for window in buffer.windows]).tolist()}
        if n not in starts:
            raise HarvestError(
                f"{n} rows of the sort buffer are committed, but no window ends there: the text is not the same as "
                "before; harvest to another --out"
            )
        self._writer.skip(n)
        return rows[n:]

    def _summary(self) -> dict[str, Any]:
        state = self._stream.state
        return {
            "n_rows": state.n_rows,
            "n_documents": state.n_docs,
            "ended": self._stream.ended,
            "repaired": state.repaired,
            **{f"skipped_{reason}": n for reason, n in zip(SKIP_REASONS, state.skipped, strict=True)},
        }

    def _result(self, seconds: float) -> HarvestResult:
        meter = self._meter
        busy = sorted(((stage, spent / max(seconds, 1e-9)) for stage, spent in meter.seconds.items()), key=_share)
        result = result_of(self._prepared, self._writer, self._summary())
        result = replace(
            result,
            resumed_rows=self._resumed_rows,
            seconds=seconds,
            rows_per_second=meter.rows / max(seconds, 1e-9),
            padding=1 - meter.rows / max(1, meter.places),
            busy=tuple(busy),
            warnings=tuple(ending_warnings(self._prepared.config, self._summary())),
        )
        for warning in result.warnings:
            self._progress.say(f"warning: {warning}")
            self._log.write(f"warning: {warning}")
        self._log.write(
            f"finished: {result.n_rows:,} rows in {seconds:.1f} s, {result.rows_per_second:,.0f} rows/s, "
            + ", ".join(f"{stage} {share:.0%}" for stage, share in busy)
        )
        return result


class _Copier:
    """Device tensors -> host arrays; on CUDA through pinned memory, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned: dict[str, torch.Tensor] = {}
        self._stream: Any = None

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        if self._device.type != "cuda":
            return {name: to_numpy(tensor) for name, tensor in tensors.items()}
        import torch

        self._stream = self._stream or torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._stream):
            hosts = {name: self._host(name, tensor) for name, tensor in tensors.items()}
            for name, tensor in tensors.items():
                hosts[name].copy_(tensor, non_blocking=True)
        self._stream.synchronize()
        return {name: to_numpy(host) for name, host in hosts.items()}

    def _host(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Pinned memory of this size; kept, since pinning is slow."""
        import torch

        kept = self._pinned.get(name)
        if kept is None or len(kept) < len(tensor):
            kept = self._pinned[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return kept[: len(tensor)]


def to_numpy(tensor: torch.Tensor) -> Any:
    """A host tensor as an array that shares its memory; bfloat16 as ml_dtypes'."""
    import torch

    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_rows(buffer: Buffer, activations: Mapping[str, Any]) -> tuple[Rows, list[DocumentRow]]:
    """A buffer's rows with all that is known about them, and the documents that begin in it."""
    windows = buffer.windows
    lengths = np.array([len(window) for window in windows])
    rows = Rows(
        activations=activations,
        token_id=np.concatenate([window.ids for window in windows]),
        doc_id=np.concatenate([window.doc_id for window in windows]),
        window=np.repeat(np.array([window.number for window in windows], np.uint64), lengths),
        position=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        doc_position=np.concatenate([window.doc_position for window in windows]),
        flags=np.concatenate([window.flags for window in windows]),
    )
    return rows, [document for window in windows for document in window.documents]


def result_of(prepared: Prepared, writer: CacheWriter, summary: Mapping[str, Any]) -> HarvestResult:
    """What a complete cache holds."""
    return HarvestResult(
        path=writer.path,
        unit=prepared.unit,
        hooks=tuple((hook.name, hook.d_in) for hook in prepared.hooks),
        dtype=prepared.dtype,
        n_rows=writer.n_rows,
        n_docs=int(summary.get("n_documents", 0)),
        n_shards=writer.n_shards,
        n_bytes=writer.bytes_written,
        ended=str(summary.get("ended", "")),
        skipped=tuple((reason, int(summary.get(f"skipped_{reason}", 0))) for reason in SKIP_REASONS),
        repaired=int(summary.get("repaired", 0)),
    )


def ending_warnings(config: HarvestConfig, summary: Mapping[str, Any]) -> list[str]:
    """A source that gave less than was asked for."""
    if summary["ended"] != "source":
        return []
    asked = [
        f"{flag} {value:,}"
        for flag, value in (("--max-tokens", config.max_tokens), ("--max-docs", config.max_docs))
        if value is not None
    ]
    if not asked:
        return []
    rows, docs = summary["n_rows"], summary["n_documents"]
    return [
        f"the data set ended before {' and '.join(asked)}: {rows:,} rows of {docs:,} documents; complete, but shorter"
    ]


def _finished(prepared: Prepared, writer: CacheWriter) -> HarvestResult:
    """A harvest that is complete already: nothing to do, unless more is asked for than it holds."""
    summary = writer.manifest.summary or {}
    config = prepared.config
    more_rows = config.max_tokens is None or config.max_tokens > writer.n_rows
    more_docs = config.max_docs is None or config.max_docs > int(summary.get("n_documents", 0))
    if summary.get("ended") != "source" and more_rows and more_docs:
        raise ConfigError(
            f"{writer.path} is a complete harvest of {writer.n_rows:,} rows, and a complete one is not extended: "
            "give the larger harvest another --out"
        )
    return replace(result_of(prepared, writer, summary), already_complete=True)


def _both(*sinks: Callable[[str], None]) -> Callable[[str], None]:
    def say(message: str) -> None:
        for sink in sinks:
            sink(message)

    return say


def _share(item: tuple[str, float]) -> float:
    return -item[1]
