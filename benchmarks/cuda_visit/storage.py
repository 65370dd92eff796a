"""Writing a cache, and reading it back in shuffled batches onto the device."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.cuda_visit.part import tell
from benchmarks.cuda_visit.place import Place
from benchmarks.cuda_visit.saes import mixtures
from benchmarks.harvest_speed import random_rows
from benchmarks.loader_speed import ALL_ROWS
from benchmarks.table import markdown
from sae_granary import open_cache
from sae_granary.cache.format.spec import CacheSpec
from sae_granary.cache.load.loader import Loader
from sae_granary.cache.write.writer import CacheWriter
from sae_granary.common.rows import HookPoint, Rows

HOOK = "layer_6"
BUFFER_ROWS = 65_536  # given to the writer at a time, as a harvest does


def cache_of(at: Place) -> Path:
    """Rows (N, 768) of sparse mixtures in bfloat16, written by the first part that needs them."""
    path = at.folder / "rows"
    if not (path / "written.json").is_file():
        tell("writing the rows that later parts read")
        shutil.rmtree(path, ignore_errors=True)
        write(path, *buffers(at))
    return path


def buffers(at: Place) -> tuple[Rows, int]:
    """One buffer of rows, and how often it is written."""
    n_rows, d_in, n_times = (4096, 32, 2) if at.tiny else (BUFFER_ROWS, 768, 32)
    rows = random_rows(n_rows, d_in)
    values = mixtures(n_rows, d_in, at.device).cpu().numpy().astype(ml_dtypes.bfloat16)
    return replace(rows, activations={HOOK: values}), n_times


def write(path: Path, rows: Rows, n_times: int) -> None:
    """Write a buffer so many times, as different documents."""
    d_in = rows.activations[HOOK].shape[1]
    spec = CacheSpec("token", (HookPoint(HOOK, "encoder.layer.6", "output", 0, d_in),), "bfloat16", 2**18, {}, {})
    with CacheWriter.open(path, spec) as writer:
        for turn in range(n_times):
            writer.begin_buffer({"turn": turn})
            documents, windows = int(rows.doc_id[-1]) + 1, np.uint64(int(rows.window[-1]) + 1)
            writer.append(
                replace(rows, doc_id=rows.doc_id + turn * documents, window=rows.window + np.uint64(turn) * windows)
            )
        writer.finish({})
    (path / "written.json").write_text(json.dumps({"rows": len(rows.token_id) * n_times}))


def writer(at: Place) -> bool:
    """Bytes per second of the cache writer, and of plain writes of the same bytes."""
    rows, n_times = buffers(at)
    values = rows.activations[HOOK]
    gigabytes = values.nbytes * n_times / 1e9
    plain = at.folder / "plain"
    start = at.wait()
    with plain.open("wb", buffering=0) as file:
        for _ in range(n_times):
            file.write(values.view(np.uint8).data)
    least = at.wait() - start
    plain.unlink()
    path = at.folder / "rows"
    shutil.rmtree(path, ignore_errors=True)
    start = at.wait()
    write(path, rows, n_times)
    ours = at.wait() - start
    table = [
        ["write()", f"{gigabytes / least:.2f}", "1.00"],
        ["cache writer", f"{gigabytes / ours:.2f}", f"{least / ours:.2f}"],
    ]
    print(f"Writing {gigabytes:.2f} GB of bfloat16 rows, d {values.shape[1]}.\n")
    print(markdown(["", "GB/s", "of the limit"], table))
    return True


def loader(at: Place) -> bool:
    """Rows per second of shuffled batches on the device."""
    opened, (batch, epochs) = open_cache(cache_of(at)), (512, 2) if at.tiny else (8192, 10)
    lines = []
    for what, options in (("every row", ALL_ROWS), ("default filters", {})):
        with Loader(opened, batch_size=batch, device=at.device, epochs=epochs, **options) as batches:
            n_batches, start = 0, at.wait()
            for _ in batches:
                n_batches += 1
            seconds = at.wait() - start
        rate = n_batches * batch / seconds
        gigabytes = rate * opened.storage.row_bytes(opened.hook(HOOK).d_in) / 1e9
        lines.append([what, f"{rate:,.0f}", f"{gigabytes:.2f}"])
    print(f"Loader: {epochs} epochs of {opened.n_rows:,} rows, start included, batches of {batch} on {at.device}.\n")
    print(markdown(["", "rows/s", "GB/s"], lines), flush=True)
    return True
