"""`python -m benchmarks.analyze --cache CACHE`: `encode` against the encoder product, `stats` against one encoding.

A topk SAE of 12,288 latents (k 32) with random weights, blocks of 4,096 rows, the cache in the page cache. Everything
runs in turn, the median of `--repeats` is taken; on a shared machine the processor's seconds say more than the clock's.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks import machine
from benchmarks.report import random_sae
from benchmarks.table import markdown
from sae_granary.analyze.encoding.encode import BLOCK_ROWS, encode_cache
from sae_granary.analyze.latents import stats
from sae_granary.analyze.latents.stats import compute_stats
from sae_granary.analyze.source import Source, open_source
from sae_granary.common.process import tuned_process

D_SAE, K = 12_288, 32
Seconds = Mapping[str, tuple[float, float]]  # by name: of the clock, of the processor


def alternated(functions: Mapping[str, Callable[[], object]], repeats: int) -> Seconds:
    """Median seconds of each function, of the clock and of the processor; all run in turn."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start, busy = time.perf_counter(), time.process_time()
            function()
            times[name].append((time.perf_counter() - start, time.process_time() - busy))
    return {name: tuple(map(statistics.median, zip(*found, strict=True))) for name, found in times.items()}  # type: ignore[misc]


def encode_table(source: Source, folder: Path, n_rows: int, repeats: int) -> str:
    """Rows per second of the product with its selection, of the SAE on rows in memory, and from disk to disk."""
    rows = torch.tensor(source.cache.hook(source.hooks[0])[:n_rows])
    sae, made = source.sae, iter(range(10**6))

    def product() -> None:
        for start in range(0, n_rows, BLOCK_ROWS):
            pre_acts = torch.addmm(sae.encoder_bias, rows[start : start + BLOCK_ROWS] - sae.b_dec, sae.W_enc)
            torch.relu(pre_acts.topk(K, dim=-1, sorted=False).values)

    def in_memory() -> None:
        for start in range(0, n_rows, BLOCK_ROWS):
            sae.encode(rows[start : start + BLOCK_ROWS])

    def to_disk() -> None:
        encode_cache(source, folder / f"codes_{next(made)}")

    with torch.no_grad():
        product()  # once before, as the others: warm caches
        found = alternated({"product": product, "memory": in_memory, "disk": to_disk}, repeats)
    labels = {"product": "product and torch.topk, rows in memory", "memory": "sae.encode, rows in memory"}
    labels["disk"] = "encode_cache: read, check, encode, write"
    return _table(found, labels, "product", n_rows, "rows/s", f"{n_rows:,} rows")


def stats_table(source: Source, folder: Path, repeats: int) -> str:
    """Seconds of `compute_stats` against one encoding pass over the same cache, co-activation apart."""
    made = iter(range(10**6))
    codes = encode_cache(source, folder / "whole")

    def to_disk() -> None:
        encode_cache(source, folder / f"again_{next(made)}")

    functions = {"encode": to_disk, "stats": lambda: compute_stats(source, codes)}
    with timed(stats, "coactive") as coactive:
        found = dict(alternated(functions, repeats))
    found["coactive"] = tuple(map(statistics.median, zip(*coactive, strict=True)))  # type: ignore[assignment]
    found["apart"] = tuple(a - b for a, b in zip(found["stats"], found["coactive"], strict=True))  # type: ignore[assignment]
    n_rows = source.cache.n_rows
    labels = {"encode": "one encoding pass", "stats": "compute_stats of its codes", "coactive": "of it co-activation"}
    labels["apart"] = "the rest"
    return _table(found, labels, "encode", n_rows, "rows/s", f"{n_rows:,} rows, {len(codes.values):,} entries")


@contextmanager
def timed(module: ModuleType, name: str) -> Iterator[list[tuple[float, float]]]:
    """Inside, the seconds of each call of a function of a module are collected: of the clock and of the processor."""
    found: list[tuple[float, float]] = []
    function = getattr(module, name)

    def call(*args: object) -> object:
        start, busy = time.perf_counter(), time.process_time()
        result = function(*args)
        found.append((time.perf_counter() - start, time.process_time() - busy))
        return result

    setattr(module, name, call)
    try:
        yield found
    finally:
        setattr(module, name, function)


def _table(found: Seconds, labels: Mapping[str, str], base: str, n: int, unit: str, title: str) -> str:
    clock, busy = found[base]
    rows = [
        [
            label,
            f"{found[name][0]:.2f}",
            f"{found[name][1]:.2f}",
            f"{n / found[name][0]:,.0f}",
            f"{clock / found[name][0]:.2f}",
            f"{busy / found[name][1]:.2f}",
        ]
        for name, label in labels.items()
    ]
    head = ["", "s", "s of the processor", unit, f"speed to {labels[base].split(',')[0]}", "by the processor"]
    return f"{title}\n\n{markdown(head, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.analyze", description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="for instance the cache that `sae-train demo` makes")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, tuned_process("cpu"):
        folder = Path(name)
        source = open_source(random_sae(folder / "sae", arguments.cache, D_SAE, K), arguments.cache, device="cpu")
        print(f"{machine.describe()}, load {os.getloadavg()[0]:.1f}; d_sae {D_SAE:,}, k {K}, blocks of {BLOCK_ROWS:,}")
        print(f"\n{encode_table(source, folder, source.cache.n_rows, arguments.repeats)}", flush=True)
        print(f"\n{stats_table(source, folder, arguments.repeats)}", flush=True)


if __name__ == "__main__":
    main()
