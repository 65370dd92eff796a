"""What a user waits for beside the work: `python -m benchmarks.startup [--against CHECKOUT] [--rounds 2]`.

Every command is a process of its own with hardly any work to do: 300 tokens, one step. What counts is its processor
time, least of several; with another checkout (its folder) the two take turns.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import describe
from benchmarks.table import markdown

HERE = Path(__file__).resolve().parents[1]
Command = tuple[str, ...]


def commands(cache: str) -> dict[str, Command]:
    """The commands by what the table calls them; each may use what those before it wrote."""
    harvest = ("harvest", "run", "--model", "demo", "--dataset", "demo", "--device", "cpu", "--quiet")
    train = ("train", "run", "--cache", cache, "--steps", "1", "--device", "cpu", "--overwrite", "--quiet")
    return {
        "sae-harvest run": (*harvest, "--layer", "3", "--max-tokens", "1", "--out", "tokens"),
        "sae-harvest run --unit text": (*harvest, "--unit", "text", "--max-tokens", "20", "--out", "texts"),
        "sae-train run --type topk": (*train, "--type", "topk", "--name", "topk"),
        "sae-train run --type batchtopk": (*train, "--type", "batchtopk", "--name", "batchtopk"),
        "sae-analyze eval": ("analyze", "eval", "runs/topk"),
        "sae-analyze report": ("analyze", "report", "runs/topk", "--quiet"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="a small cache: sae-harvest run --max-tokens 60k")
    parser.add_argument("--against", type=Path, help="another checkout, compared in turns")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    print(describe())
    print(table(commands(str(given.cache.resolve())), [*filter(None, [given.against]), HERE], given.rounds))


def table(chosen: dict[str, Command], checkouts: Sequence[Path], rounds: int) -> str:
    """CPU seconds of each command in each checkout, the wall clock of the last, and those of importing torch."""
    lines = []
    for name, command in {"python -c 'import torch'": (), **chosen}.items():
        runs: dict[Path, list[tuple[float, float]]] = {checkout: [] for checkout in checkouts}
        for _ in range(rounds):
            for checkout, times in runs.items():
                with tempfile.TemporaryDirectory() as folder:
                    if command[:1] == ("analyze",):
                        _seconds(checkout, chosen["sae-train run --type topk"], folder)
                    times.append(_seconds(checkout, command, folder))
        cpu = [f"{min(cpu for cpu, _ in times):.2f}" for times in runs.values()]
        lines.append([name, *cpu, f"{min(wall for _, wall in runs[checkouts[-1]]):.1f}"])
    header = ["", *["CPU s, before"] * (len(checkouts) - 1), "CPU s", "wall s"]
    return markdown(header, lines)


def _seconds(checkout: Path, command: Command, folder: str) -> tuple[float, float]:
    """(processor time, wall clock) of one process, its own children included. Raises RuntimeError if it fails."""
    words = ["-m", f"sae_granary.{command[0]}.cli", *command[1:]] if command else ["-c", "import torch"]
    environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    start, before = time.perf_counter(), os.times()
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    after, wall = os.times(), time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed: {done.stderr.strip()[-500:]}")
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return cpu, wall


if __name__ == "__main__":
    main()
