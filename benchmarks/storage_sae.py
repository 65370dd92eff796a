"""SAEs trained on rows stored in several dtypes, and a training step on each: `python -m benchmarks.storage_sae`.

The same batches in the same order, several seeds of the initialization; every SAE is evaluated on exact (float32) rows.
`--table step` times loader and step together in interleaved pairs, as CPU time, the least of several repeats.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.table import markdown
from sae_granary import load_sae, open_cache, train_sae
from sae_granary.cache.convert import convert
from sae_granary.cache.load.loader import Loader
from sae_granary.cache.load.selection import Selection
from sae_granary.cache.read.reader import Cache
from sae_granary.common.process import keep_freed_memory
from sae_granary.sae_core import make_config, registry
from sae_granary.train.result.evaluate import evaluate

DTYPES = ("float32", "bfloat16", "int8")


def stored(exact: Path, folder: Path) -> dict[str, Path]:
    """The exact rows in each dtype."""
    paths = {dtype: folder / dtype for dtype in DTYPES if dtype != "float32"}
    for dtype, path in paths.items():
        convert(exact, path, dtype)
    return {"float32": exact, **paths}


def exact_fvu(folder: Path, exact: Cache, n_rows: int) -> float:
    """FVU of an SAE on held-out exact rows."""
    with Loader(exact, batch_size=4096, epochs=1, selection=Selection(part="heldout")) as loader:
        x = torch.cat([batch.x for batch in loader if isinstance(batch.x, torch.Tensor)])[:n_rows]
    fvu = evaluate(load_sae(folder), x.split(4096))["fvu"]
    assert fvu is not None
    return fvu


def quality(caches: dict[str, Path], folder: Path, n_seeds: int, **settings: Any) -> str:
    """FVU on exact rows against SAEs of exact rows with the same seed."""
    exact = open_cache(caches["float32"])
    fvu: dict[str, list[float]] = {dtype: [] for dtype in caches}
    own: dict[str, list[float]] = {dtype: [] for dtype in caches}
    for seed in range(n_seeds):
        for dtype, path in caches.items():
            name = f"{dtype}_{seed}"
            result = train_sae(
                cache=str(path), name=name, runs_dir=str(folder), type="topk", init_seed=seed, device="cpu", **settings
            )
            fvu[dtype].append(exact_fvu(result.folder, exact, 16_384))
            own[dtype].append(float(result.summary["eval"]["fvu"]))
        print(seed, {dtype: round(values[-1], 5) for dtype, values in fvu.items()}, flush=True)
    rows = []
    for dtype, values in fvu.items():
        change = [100 * (a / b - 1) for a, b in zip(values, fvu["float32"], strict=True)]
        error = statistics.stdev(change) / len(change) ** 0.5 if len(change) > 1 else 0.0
        means = (statistics.mean(values), statistics.mean(own[dtype]))
        rows.append([dtype, *(f"{mean:.4f}" for mean in means), f"{statistics.mean(change):+.2f} % ± {error:.2f}"])
    return markdown(["stored as", "FVU, exact rows", "FVU, rows as stored", "against float32"], rows)


def steps(caches: dict[str, Path], n_pairs: int, d_sae: int) -> str:
    """CPU time of loader and step: forward, backward and Adam of a topk SAE."""
    keep_freed_memory("cpu")
    seconds: dict[str, list[float]] = {dtype: [] for dtype in caches}
    alone: dict[str, list[float]] = {dtype: [] for dtype in caches}
    loaders = {dtype: iter(Loader(open_cache(path), batch_size=4096)) for dtype, path in caches.items()}
    kind, d_in = registry.get("topk"), open_cache(next(iter(caches.values()))).hook().d_in
    core = kind(make_config(kind, {"d_in": d_in, "d_sae": d_sae, "k": 32})).train()
    core.reset_weights(torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(core.parameters(), 1e-4)
    for _ in range(n_pairs):
        for dtype, loader in loaders.items():
            start = time.process_time()
            for _ in range(20):
                next(loader)
            alone[dtype].append((time.process_time() - start) / 20)
            start = time.process_time()
            for _ in range(2):
                batch = next(loader)
                assert isinstance(batch.x, torch.Tensor)
                optimizer.zero_grad()
                (core(batch.x).x_hat - batch.x).square().mean().backward()
                optimizer.step()
            seconds[dtype].append((time.process_time() - start) / 2)
    base = min(seconds["bfloat16"])
    rows = [
        [dtype, f"{1e3 * min(alone[dtype]):.2f}", f"{1e3 * min(times):.1f}", f"{min(times) / base:.3f}"]
        for dtype, times in seconds.items()
    ]
    return markdown(["stored as", "batch alone, ms", "batch and step, ms", "against bfloat16"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.storage_sae", description=__doc__)
    parser.add_argument("--cache", required=True, help="exact rows: a cache in float32 with one hook point")
    parser.add_argument("--table", choices=("quality", "step"), default="quality")
    parser.add_argument("--seeds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=1536)
    arguments = parser.parse_args()
    print(machine.describe(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        caches = stored(Path(arguments.cache), Path(folder))
        if arguments.table == "step":
            print(steps(caches, 12, arguments.d_sae))
            return
        settings = {"steps": arguments.steps, "batch_size": arguments.batch_size, "d_sae": arguments.d_sae, "k": 32}
        print(quality(caches, Path(folder) / "runs", arguments.seeds, **settings))


if __name__ == "__main__":
    main()
