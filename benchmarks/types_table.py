"""Every type on the demo: `python -m benchmarks.types_table` trains each by command and prints the README's table."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks import machine
from benchmarks.table import markdown
from sae_granary.sae_core import registry

STEPS, BATCH, D_SAE, K = 200, 1024, 1536, 32
LAYERS = (2, 3, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, help="a demo cache with layers 2, 3 and 4; harvested when not given")
    parser.add_argument("--out", type=Path, help="keep the runs in this folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = arguments.cache or _harvest(Path(folder) / "demo")
        runs = arguments.out or Path(folder) / "runs"
        lines = [_line(name, _train(name, cache, runs)) for name in registry.names()]
    header = ["type", "L0", "FVU", "dead", "seconds"]
    title = f"MiniLM, {STEPS} steps of {BATCH} rows, d_sae {D_SAE}, held-out documents ({machine.describe()})."
    print(f"{title}\n\n{markdown(header, lines)}")


def _harvest(cache: Path) -> Path:
    demo = ["--model", "demo", "--dataset", "demo", "--layers", ",".join(map(str, LAYERS))]
    _command("sae_granary.harvest.cli", "run", *demo, "--out", cache, "-q")
    return cache


def _train(name: str, cache: Path, runs: Path) -> dict[str, float]:
    cls = registry.get(name)
    has_k = "k" in cls.Config.__dataclass_fields__
    n_hooks = cls.Config.__dataclass_fields__.get("n_hooks")
    pair = n_hooks is not None and n_hooks.metadata["le"] == 2
    layers = LAYERS[:2] if pair else LAYERS if cls.reads.several else LAYERS[1:2]
    hooks = [flag for layer in layers for flag in ("--hook", f"layer_{layer}")]
    sizes = ["--d-sae", D_SAE, "--steps", STEPS, "--batch-size", BATCH, *(["--k", K] if has_k else [])]
    place = ["--runs-dir", runs, "--name", name, "--overwrite", "-q"]
    _command("sae_granary.train.cli", "run", "--cache", cache, "--type", name, *hooks, *sizes, *place)
    summary: dict[str, float] = json.loads((runs / name / "summary.json").read_text())
    return summary


def _line(name: str, summary: dict[str, float]) -> list[str]:
    numbers = summary["eval"]
    seconds = f"{summary['seconds']:.0f}"
    return [f"`{name}`", f"{numbers['l0']:.1f}", f"{numbers['fvu']:.3f}", f"{summary['dead']:.1%}", seconds]


def _command(module: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
