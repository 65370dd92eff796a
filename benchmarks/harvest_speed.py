"""The harvest against the bare forward pass of the truncated model on the same batches, and its writer against write().

Limit 1: the same model, the same batches, nothing captured, nothing written. Limit 2: one sequential write and fsync.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.apart import Contestant, Turn, apart
from benchmarks.ragged import write_jsonl
from benchmarks.table import markdown
from benchmarks.timing import interleaved
from sae_granary.cache.format.spec import CacheSpec
from sae_granary.cache.format.storage import STORAGE
from sae_granary.cache.write.writer import CacheWriter
from sae_granary.common.errors import ConfigError
from sae_granary.common.files import write_all
from sae_granary.common.process import keep_freed_memory
from sae_granary.common.rows import HookPoint, Rows
from sae_granary.harvest.config import HarvestConfig, TextConfig
from sae_granary.harvest.prepare import Prepared, prepare
from sae_granary.harvest.run import harvest_activations, load
from sae_granary.harvest.spec import cache_spec
from sae_granary.harvest.text.document import documents
from sae_granary.models.config import ModelConfig, WhereConfig
from sae_granary.models.forward import TokenModel, Work
from sae_granary.models.hooks import Capture
from sae_granary.models.tokens.contexts import StreamState
from sae_granary.models.tokens.stream import WindowStream, buffers, tokenize_stream

LAYER = 3
BARE = "bare truncated forward, malloc keeps freed blocks (limit)"


def run(quick: bool) -> str:
    n_texts, n_rows, repeats = (400, 65_536, 3) if quick else (1500, 262_144, 5)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = TextConfig(str(write_jsonl(folder / "ragged.jsonl", n_texts)))
        config = HarvestConfig(ModelConfig("demo"), WhereConfig(layers=(LAYER,)), texts)
        forward = forward_table(
            config, f"MiniLM, layer {LAYER} of 6", folder, repeats, None if quick else _compiled(config)
        )
        return f"{forward}\n\n{write_table(folder, n_rows, repeats)}"


def forward_table(
    config: HarvestConfig,
    what: str,
    folder: Path,
    repeats: int,
    compiled: HarvestConfig | None = None,
    race: Callable[[Mapping[str, Contestant], int], dict[str, float]] = apart,
) -> str:
    """A harvest of `what` against the bare forward pass; `race` gives the seconds of each."""
    prepared, model, work = _work(config)
    n_rows, n_places = sum(w.buffer.n_rows for w in work), sum(w.n_places for w in work)
    runs: dict[str, Contestant] = {
        BARE: partial(_bare, config, keep=True),
        "the same, malloc as it is": partial(_bare, config, keep=False),
        "the first, its rows written with write() and one fsync": partial(_written, config, folder / "rows"),
        "harvest, checks and writing included": partial(_ours, config, folder / "cache"),
    }
    if compiled is not None:
        runs["harvest --compile"] = partial(_ours, compiled, folder / "compiled")
    seconds = race(runs, repeats)
    lines = [[name, f"{n_rows / spent:,.0f}", f"{seconds[BARE] / spent:.2f}"] for name, spent in seconds.items()]
    title = (
        f"Harvest: {what}, {n_rows:,} tokens in texts of {n_rows / len(_texts(work)):.0f}, "
        f"{prepared.compute_dtype} on {model.device}, padding {1 - n_rows / n_places:.1%}. "
        "From the first text to the last commit; checks, hashes, loading and compiling come before."
    )
    return f"{title}\n\n{markdown(['', 'real tokens/s', 'of the limit'], lines)}"


def _work(config: HarvestConfig) -> tuple[Prepared, TokenModel, list[Work]]:
    """All batches of a harvest, ready for the model."""
    prepared = prepare(config, lambda message: None)
    _, model = load(prepared, lambda message: None)
    assert isinstance(model, TokenModel)
    return prepared, model, [model.prepare(each) for each in buffers(_stream(prepared), prepared.buffer_tokens)]


def _bare(config: HarvestConfig, turn: Turn, *, keep: bool) -> None:
    """The forward pass of the truncated model alone, over and over."""
    prepared, model, work = _work(config)
    if keep:
        keep_freed_memory()
    capture = Capture(model._capture._base, prepared.hooks)
    model._capture.close()
    while True:
        turn()
        with torch.inference_mode():
            for batch in (batch for w in work for batch in w.batches):
                capture.run(batch.input_ids, batch.attention_mask, lambda hook, value: None)


def _written(config: HarvestConfig, path: Path, turn: Turn) -> None:
    """The bare forward pass, and a thread that writes its rows' bytes through the page cache."""
    prepared, model, work = _work(config)
    keep_freed_memory()
    capture = Capture(model._capture._base, prepared.hooks)
    model._capture.close()
    row_bytes = sum(hook.d_in for hook in prepared.hooks) * STORAGE[cache_spec(prepared).dtype].item_bytes
    rows = [np.ones((w.buffer.n_rows, row_bytes), np.uint8) for w in work]
    while True:
        turn()
        with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as writer, torch.inference_mode():
            writes = []
            for w, data in zip(work, rows, strict=True):
                for batch in w.batches:
                    capture.run(batch.input_ids, batch.attention_mask, lambda hook, value: None)
                writes.append(writer.submit(write_all, file.fileno(), data.data))
            writes.append(writer.submit(os.fsync, file.fileno()))
            for write in writes:
                write.result()
        path.unlink()


def _ours(config: HarvestConfig, out: Path, turn: Turn) -> None:
    """The whole harvest, over and over, in a process as the command sets it."""
    keep_freed_memory(config.model.device)
    took = None
    while True:
        turn(took)
        took = harvest_activations(replace(config, out=out), quiet=True).seconds
        shutil.rmtree(out)


def _compiled(config: HarvestConfig) -> HarvestConfig | None:
    """The same harvest with `--compile`; None without a compiler."""
    compiled = replace(config, model=replace(config.model, compile=True))
    try:
        prepare(compiled, lambda message: None)
    except ConfigError:
        return None
    return compiled


def _stream(prepared: Prepared) -> WindowStream:
    docs = documents(prepared.source, 0, prepared.render)
    return WindowStream(tokenize_stream(docs, prepared.tokenize), prepared.rules, StreamState())


def _texts(work: list[Work]) -> set[int]:
    return {int(window.doc_id.max()) for w in work for window in w.buffer.windows}


def write_table(folder: Path, n_rows: int, repeats: int) -> str:
    """The cache's writer against one write()."""
    rows = random_rows(n_rows, 768)
    data = rows.activations["layer_6"]
    counter = iter(range(1000))

    def plain() -> None:
        path = folder / "plain"
        with path.open("wb") as file:
            file.write(data.data)
            file.flush()
            os.fsync(file.fileno())
        path.unlink()

    def ours() -> None:
        path = folder / f"written_{next(counter)}"
        write_cache(path, rows, n_rows)
        shutil.rmtree(path)

    seconds = interleaved({"plain": plain, "ours": ours}, repeats)
    gb = data.nbytes / 1e9
    table = [
        ["one write() and fsync (limit)", f"{gb / seconds['plain']:.2f}", "1.00"],
        [
            "cache writer: checks, statistics, checksums, fsync",
            f"{gb / seconds['ours']:.2f}",
            f"{seconds['plain'] / seconds['ours']:.2f}",
        ],
    ]
    return f"Writing {gb:.2f} GB of float32 rows.\n\n{markdown(['', 'GB/s', 'of the limit'], table)}"


def random_rows(n_rows: int, width: int) -> Rows:
    """Standard normal rows in windows of 128 and documents of 512."""
    generator = np.random.default_rng(0)
    index = np.arange(n_rows)
    return Rows(
        activations={"layer_6": generator.standard_normal((n_rows, width), dtype=np.float32)},
        token_id=(index % 30_000).astype(np.int32),
        doc_id=(index // 512).astype(np.int64),
        window=(index // 128).astype(np.uint64),
        position=(index % 128).astype(np.int32),
        doc_position=(index % 512).astype(np.int32),
        flags=np.zeros(n_rows, dtype=np.uint8),
    )


def write_cache(path: Path, rows: Rows, rows_per_shard: int, dtype: str = "float32", **options: Any) -> None:
    """Write the rows of one hook point; `options` are those of `CacheWriter.open`."""
    [(name, x_ND)] = rows.activations.items()
    hook = HookPoint(name, "encoder.layer.6", "output", 0, x_ND.shape[1])
    spec = CacheSpec("token", (hook,), dtype, rows_per_shard, provenance={}, fingerprint={})
    with CacheWriter.open(path, spec, **options) as writer:
        writer.begin_buffer({})
        writer.append(rows)
        writer.finish({})
