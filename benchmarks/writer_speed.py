"""The cache writer in parts: what a pass over the rows costs one thread, and the whole writer with more of them.

Rows are bfloat16, 768 wide, written to memory (`/dev/shm`) where there is one, so that no disk is in the way. Parts are
timed by the processor time of one thread, which other programs on the machine disturb little; the whole writer also by
the clock.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from benchmarks.harvest_speed import random_rows, write_cache
from benchmarks.table import markdown
from sae_granary.cache.format.layout import cache_layout
from sae_granary.cache.format.stats import block_sums, moments_of
from sae_granary.cache.format.storage import STORAGE, Array
from sae_granary.common.rows import HookPoint, Rows

HOOK, WIDTH, DTYPE = "layer_6", 768, STORAGE["bfloat16"]
_MEMORY = Path("/dev/shm")


def run(quick: bool) -> str:
    """Return the table of the parts and that of the writer."""
    return tables(32_768 if quick else 131_072, (1, 2) if quick else (1, 2, 4, 8), 3 if quick else 5)


def tables(n_rows: int, threads: tuple[int, ...], rounds: int) -> str:
    """Both tables, of so many rows."""
    rows = _bfloat16(random_rows(n_rows, WIDTH))
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        return f"{_parts(rows, Path(folder), rounds)}\n\n{_whole(rows, Path(folder), threads, rounds)}"


def _parts(rows: Rows, folder: Path, rounds: int) -> str:
    x_ND = rows.activations[HOOK]
    size = cache_layout([_point()], DTYPE.name, len(x_ND)).activations[HOOK].inner_rows
    chunk, hasher, gb = np.empty((size, WIDTH), DTYPE.numpy), xxhash.xxh3_128(), x_ND.nbytes / 1e9

    sums = block_sums(x_ND[:size])

    def chunks(work: Callable[[Array], object]) -> Callable[[], None]:
        def every() -> None:
            for start in range(0, len(x_ND), size):
                work(x_ND[start : start + size])

        return every

    def write() -> None:
        with (folder / "plain").open("wb", buffering=0) as file:
            chunks(lambda block: file.write(block.view(np.uint8).data))()

    works = {
        "sums of dimensions, squares and rows (on a GPU: the device)": chunks(block_sums),
        "moments and norms from the sums": chunks(lambda block: moments_of(sums)),
        "copy into a chunk (only past the page cache, or to cast)": chunks(lambda block: DTYPE.cast(block, chunk)),
        "finite check (only of chunks that two buffers share)": chunks(DTYPE.first_non_finite),
        "XXH3-128": chunks(lambda block: hasher.update(block.view(np.uint8).data)),
        "write()": write,
    }
    lines = [[name, f"{gb / _least(work, rounds)[1]:.2f}"] for name, work in works.items()]
    title = f"Parts of writing {gb:.2f} GB of {DTYPE.name} rows of {WIDTH}, one thread, processor time."
    return f"{title}\n\n{markdown(['', 'GB/s'], lines)}"


def _whole(rows: Rows, folder: Path, threads: tuple[int, ...], rounds: int) -> str:
    gb, lines = rows.activations[HOOK].nbytes / 1e9, []
    summed = _with_sums(rows, cache_layout([_point()], DTYPE.name, rows.n_rows).activations[HOOK].inner_rows)
    for name, given in (("", rows), (", sums given, as by a GPU", summed)):
        for n_threads in threads:

            def write(given: Rows = given, n_threads: int = n_threads) -> None:
                write_cache(folder / "cache", given, rows.n_rows, DTYPE.name, n_threads=n_threads)

            wall, cpu = _least(write, rounds, lambda: shutil.rmtree(folder / "cache"))
            lines.append([f"{n_threads} thread{'s' * (n_threads > 1)}{name}", f"{gb / wall:.2f}", f"{gb / cpu:.2f}"])
    return f"The whole writer.\n\n{markdown(['', 'GB/s', 'GB per second of processor time'], lines)}"


def _least(work: Callable[[], None], rounds: int, undo: Callable[[], None] = lambda: None) -> tuple[float, float]:
    """(seconds by the clock, seconds of processor time), the least of each; `undo` is not timed."""
    times = []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
        undo()
    walls, cpus = zip(*times, strict=True)
    return min(walls), min(cpus)


def _bfloat16(rows: Rows) -> Rows:
    return replace(rows, activations={HOOK: rows.activations[HOOK].astype(DTYPE.numpy)})


def _with_sums(rows: Rows, size: int) -> Rows:
    x_ND = rows.activations[HOOK]
    sums = {start: block_sums(x_ND[start : start + size]) for start in range(0, len(x_ND) - size + 1, size)}
    return replace(rows, sums={HOOK: sums})


def _point() -> HookPoint:
    return HookPoint(HOOK, "encoder.layer.6", "output", 0, WIDTH)
