"""`python -m benchmarks.shards [--shards 100000]`: open and shuffle a cache of many shards, up to its first batch.

The cache is made of sparse files in a temporary folder, files of equal content as links: it takes names, not space. The
reading is done by a process of its own, whose peak memory is told. Times are of the processor: other work on the
machine does not count, and the files are in memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS_PER_SHARD = 4096
BATCH = 4096


def read(path: Path) -> None:
    """Print a line for each phase of reading a cache in this process."""
    from sae_granary import open_cache
    from sae_granary.cache.format.records import load_manifest
    from sae_granary.cache.load.loader import Loader

    print(f"{'':<34}{'CPU s':>8}{'MiB peak':>10}")
    start = time.process_time()

    def tell(phase: str) -> None:
        nonlocal start
        print(f"{phase:<34}{time.process_time() - start:>8.2f}{_peak_mib():>10,.0f}", flush=True)
        start = time.process_time()

    load_manifest(path)
    tell("manifest alone")
    opened = open_cache(path)
    tell("open: manifest, names of the files")
    with Loader(opened, batch_size=BATCH) as loader:
        tell("plan the order")
        next(loader)
        tell("first pool and batch")
        for _ in range(20):
            next(loader)
        tell("20 more batches")


def _peak_mib() -> float:
    """Of this process since it was started; `getrusage` also counts the one that started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10


def main() -> None:
    """Make a cache and read it in another process; `--read` is that process."""
    parser = argparse.ArgumentParser(prog="benchmarks.shards", description=__doc__)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument(
        "--folder", type=Path, help="where the files are made (default: the system's for temporary ones)"
    )
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        read(given.read)
        return
    from benchmarks import machine
    from benchmarks.sparse_cache import write_sparse_cache

    print(machine.describe())
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        path = write_sparse_cache(Path(folder) / "cache", given.shards, ROWS_PER_SHARD, linked=True)
        n_bytes = (path / "manifest.json").stat().st_size
        print(f"{given.shards:,} shards of {ROWS_PER_SHARD:,} rows, manifest of {n_bytes / 1e6:,.1f} MB", flush=True)
        subprocess.run([sys.executable, "-m", "benchmarks.shards", "--read", str(path)], check=True)


if __name__ == "__main__":
    main()
