"""What a harvest will need: rows, bytes, shards, free space, time. No weights are loaded."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

from sae_granary.cache.read.listing import bytes_in
from sae_granary.cache.write.disk_space import SAMPLE, bytes_per_document, planned_bytes
from sae_granary.common.files import free_bytes
from sae_granary.common.quantities import byte_size, duration
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.errors import NoRowsError, SpaceError
from sae_granary.harvest.prepare import Prepared, Say, prepare
from sae_granary.harvest.text.document import skipped_counts, to_document
from sae_granary.models.tokens.document import Document
from sae_granary.models.tokens.stream import WindowStream, tokenize_stream
from sae_granary.models.tokens.vocabulary import vocabulary

SAMPLE_DOCS = 256  # tokenized, to learn rows per byte of text; where a row is a text, more are read at no cost
_SAMPLE_BYTES = 16 << 20
_TEXT_SHARE = 0.02  # bytes of documents per byte of the arrays, of a text that is not read before: standard input
_MATMUL_SIZE = {"cpu": 1024, "cuda": 4096}
_MATMUL_SHARE = 0.5  # of the speed of one large matrix product that a whole forward pass reaches, roughly


@dataclass(frozen=True)
class Plan:
    """The answer of `sae-harvest plan`; None where it cannot be known beforehand."""

    prepared: Prepared
    n_rows: int | None
    rows_from: str  # how n_rows is known
    n_bytes: int | None
    n_shards: int | None
    free_bytes: int
    seconds: float | None
    n_blocks: int | None = None  # of a harvest in blocks

    @property
    def fits(self) -> bool:
        """Whether the disk has room, as far as known."""
        return self.n_bytes is None or self.n_bytes <= self.free_bytes


def plan(config: HarvestConfig, say: Say) -> Plan:
    """Check a harvest and foretell its size."""
    prepared = prepare(config, say)
    estimate = estimate_rows(prepared)
    n_rows = estimate.n_rows
    return Plan(
        prepared=prepared,
        n_rows=n_rows,
        rows_from=estimate.rows_from,
        n_bytes=None if n_rows is None or _no_width(prepared) else _bytes_of(prepared, estimate),
        n_shards=None if n_rows is None or _no_width(prepared) else _n_shards(prepared, estimate),
        free_bytes=free_bytes(config.out_path),
        seconds=None if n_rows is None else estimate_seconds(prepared, n_rows),
        n_blocks=None if (each := _rows_per_block(prepared, estimate)) is None else math.ceil((n_rows or 0) / each),
    )


def plan_rows(result: Plan, time_words: str = "") -> list[tuple[str, str]]:
    """The plan as a table; `time_words` is a time that was measured."""
    prepared, source = result.prepared, result.prepared.source
    unit = "tokens" if prepared.unit == "token" else "texts"
    unknown = "not known before the text is read: give --max-tokens"
    rows = [
        ("cache", str(prepared.config.out_path)),
        ("model", f"{prepared.located.name}, {prepared.n_layers or '?'} layers, {prepared.model_class or 'pooled'}"),
        ("hook points", ", ".join(f"{hook.name} ({_no_width(prepared) or hook.d_in})" for hook in prepared.hooks)),
        ("text", ", ".join([source.name, *_columns(prepared)])),
        ("contexts", f"{prepared.rules.ctx_len} tokens" if prepared.unit == "token" else "one text each"),
        ("rows", unknown if result.n_rows is None else f"{result.n_rows:,} {unit} ({result.rows_from})"),
        ("dtype", f"{prepared.dtype} (computed in {prepared.compute_dtype} on {prepared.device})"),
    ]
    if result.n_bytes is not None:
        rows += [
            ("bytes", f"{result.n_bytes:,} ({byte_size(result.n_bytes)})"),
            ("shards", f"{result.n_shards:,} of up to {prepared.rows_per_shard:,} rows"),
        ]
    if (docs := prepared.config.block_docs) is not None:
        number = "" if result.n_blocks is None else f"about {result.n_blocks:,} "
        rows.append(("blocks", f"{number}of {docs:,} documents"))
    rows.append(("free space", f"{result.free_bytes:,} ({byte_size(result.free_bytes)})"))
    if time_words:
        rows.append(("time", time_words))
    elif result.seconds is not None:
        rows.append(("time", f"about {duration(result.seconds)} after loading, if the model is the limit"))
    return rows


def _no_width(prepared: Prepared) -> str:
    """Why the bytes of a row are not known; empty if they are."""
    return "" if prepared.widths_known or prepared.unit == "token" else "width known when it is loaded"


def _columns(prepared: Prepared) -> list[str]:
    """The columns of the text, and those that are kept."""
    text, kept = prepared.source.columns, prepared.config.text.keep_columns
    shown = [f"column{'s' if len(text) > 1 else ''} {', '.join(text)}"] if text else []
    return [*shown, f"kept: {', '.join(kept)}"] if kept else shown


def check_space(prepared: Prepared) -> None:
    """Refuse a harvest whose planned size is more than the disk has free."""
    estimate = estimate_rows(prepared)
    if estimate.n_rows is None:
        return
    out = prepared.config.out_path
    needed, free = _bytes_of(prepared, estimate), free_bytes(out)
    if needed - bytes_in(out) > free:
        raise SpaceError(
            f"not enough space for {out}: {needed:,} bytes are planned and {free:,} are free; "
            "use a smaller --max-tokens, fewer layers, --dtype bfloat16 or int8, or another --out"
        )


@dataclass(frozen=True)
class Estimate:
    """How many rows a harvest will have, and what its documents take."""

    n_rows: int | None
    rows_from: str  # how they are known
    document_bytes: float | None = None  # on disk, per row; None where the text was not read
    rows_per_record: float | None = None  # of the source; None where the text was not read


def estimate_rows(prepared: Prepared) -> Estimate:
    """The rows, from the share of the source that its first records take, and from the limits."""
    asked = prepared.config.max_tokens
    size = prepared.source.n_bytes()
    if size is None:
        return Estimate(asked, "--max-tokens")
    seen_bytes, whole = 0.0, True
    most = SAMPLE_DOCS if prepared.unit == "token" else SAMPLE

    def sample() -> Iterator[Document]:
        nonlocal seen_bytes, whole
        for doc_id, record in enumerate(prepared.source.records(0)):
            if doc_id >= most or (doc_id >= SAMPLE_DOCS and seen_bytes > _SAMPLE_BYTES):
                whole = False
                return
            seen_bytes += record.n_bytes
            yield to_document(doc_id, record, prepared.render)

    tokenized = tokenize_stream(sample(), prepared.tokenize)
    stream = WindowStream(tokenized, prepared.rules, max_docs=prepared.config.max_docs, max_rows=asked)
    documents = [document for window in stream for document in window.documents]
    rows = stream.state.n_rows
    whole = whole and stream.ended == "source"
    if whole and rows == 0:
        source = prepared.source
        raise NoRowsError(source.name, skipped_counts(stream.state.skip_counts), source.columns)
    each = bytes_per_document(documents, prepared.config.text.keep_columns) * len(documents) / max(1, rows)
    found = each, rows / max(1, stream.state.next_doc)
    if whole or stream.ended in ("max_tokens", "max_docs"):
        return Estimate(rows, "counted", *found)
    estimate = round(rows * max(1.0, size / max(1.0, seen_bytes)))
    if prepared.config.max_docs is not None:
        estimate = min(estimate, round(rows * prepared.config.max_docs / max(1, stream.state.n_docs)))
    if asked is not None and asked <= estimate:
        return Estimate(asked, "--max-tokens", *found)
    return Estimate(estimate, f"estimated from {stream.state.n_docs:,} documents", *found)


def _rows_per_block(prepared: Prepared, estimate: Estimate) -> int | None:
    """Rows of a block of documents; None where there are no blocks, or the text was not read."""
    docs, each = prepared.config.block_docs, estimate.rows_per_record
    return None if docs is None or each is None else max(1, round(docs * each))


def _n_shards(prepared: Prepared, estimate: Estimate) -> int:
    n_rows, size = estimate.n_rows or 0, prepared.rows_per_shard
    in_block = _rows_per_block(prepared, estimate) or n_rows or 1  # each block ends with a short shard
    return n_rows // in_block * math.ceil(in_block / size) + math.ceil(n_rows % in_block / size)


def _bytes_of(prepared: Prepared, estimate: Estimate) -> int:
    n_rows, each = estimate.n_rows or 0, estimate.document_bytes
    documents = prepared.layout.bytes_of(n_rows) * _TEXT_SHARE if each is None else n_rows * each
    words = None if prepared.unit == "text" else vocabulary(prepared.tokenizer)
    return planned_bytes(prepared.layout, n_rows, documents, words, _n_shards(prepared, estimate))


def estimate_seconds(prepared: Prepared, n_rows: int) -> float | None:
    """Time of the forward passes, from the speed of one matrix product on this device."""
    if not prepared.flops_per_token:
        return None
    return n_rows * prepared.flops_per_token / (_matmul_speed(prepared) * _MATMUL_SHARE)


def _matmul_speed(prepared: Prepared) -> float:
    """Operations per second of a matrix product in the compute dtype."""
    import torch

    kind = prepared.device.split(":")[0]
    size = _MATMUL_SIZE.get(kind, 1024)
    a = torch.ones((size, size), dtype=getattr(torch, prepared.compute_dtype), device=prepared.device)
    float((a @ a)[0, 0])
    start = time.perf_counter()
    repeats = 4
    for _ in range(repeats):
        b = a @ a
    float(b[0, 0])
    return repeats * 2.0 * size**3 / (time.perf_counter() - start)
