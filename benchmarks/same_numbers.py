"""Whether two checkouts compute the same numbers, on one thread: golden losses of all types, and the demo.

    python -m benchmarks.same_numbers BEFORE AFTER     # folders of checkouts, e.g. of a git worktree; about 6 minutes

The demo is a harvest of 129k tokens and two SAEs of 300 steps. Compared are the bytes of the cache, every logged number
but times, the final evaluation, and the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

TYPES = ("topk", "batchtopk")
SETTINGS = ("--k", "32", "--d-sae", "3072", "--steps", "300", "--batch-size", "2048")
TIMING = ("seconds", "tokens_per_second")
GOLDEN = (
    "import json, torch; torch.set_num_threads(1); import golden_losses as g; "
    "print(json.dumps({name: g.curve(name) for name in g.registry.names()}))"
)

Numbers = dict[str, Any]  # what was measured -> its value, or the hash of its bytes


def measure(checkout: Path, folder: Path) -> Numbers:
    """Run the code of a checkout in a folder."""
    cache, runs = folder / "cache" / "demo_l3", folder / "runs"
    demo = ["--model", "demo", "--dataset", "demo", "--layer", "3"]
    _command(checkout, "harvest", "run", *demo, "--out", str(cache), "--quiet")
    files = [path for path in sorted(cache.rglob("*")) if path.is_file()]
    numbers: Numbers = {f"cache: {path.relative_to(cache)}": _hash(path.read_bytes()) for path in files}
    for name in ("harvest.log", "about.json"):
        numbers.pop(f"cache: {name}", None)
    for name in TYPES:
        where = ["--cache", str(cache), "--runs-dir", str(runs), "--name", name]
        _command(checkout, "train", "run", *where, "--type", name, *SETTINGS, "--quiet")
        numbers |= {f"{name}: {key}": value for key, value in _run(runs / name).items()}
    golden = json.loads(_python(checkout, "-c", GOLDEN))
    return numbers | {f"golden losses: {name}": curve for name, curve in golden.items()}


def _run(folder: Path) -> Numbers:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    names = dict.fromkeys(name for line in lines for name in line if name not in TIMING)
    metrics = {f"metrics: {name}": [line.get(name) for line in lines] for name in names}
    weights = load_file(folder / "sae_weights.safetensors")  # not its bytes: metadata beside the tensors may change
    tensors = {f"weights: {name}": _hash(tensor.tobytes()) for name, tensor in weights.items()}
    return metrics | {f"eval: {name}": value for name, value in summary["eval"].items()} | tensors


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _command(checkout: Path, stage: str, *arguments: str) -> None:
    root = "sae_granary." if (checkout / "sae_granary").is_dir() else ""  # its name since version 0.2
    _python(checkout, "-m", f"{root}{stage}.cli", *arguments)


def _python(checkout: Path, *arguments: str) -> str:
    paths = os.pathsep.join([str(checkout), str(checkout / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # Python searches the current folder before PYTHONPATH: standing in the other checkout would measure that one twice.
    done = subprocess.run(
        [sys.executable, *arguments], cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs, or is on one side only."""
    sides = {name: " (only before)" for name in before if name not in after}
    sides |= {name: " (only after)" for name in after if name not in before}
    return [name + sides.get(name, "") for name in {**before, **after} if before.get(name) != after.get(name)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.same_numbers", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    arguments = parser.parse_args()
    found = []
    for checkout in (arguments.before, arguments.after):
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(checkout.resolve(), Path(folder)))
    differing = differences(*found)
    print("\n".join(f"differs: {name}" for name in differing) or f"all {len(found[0])} numbers and files are the same")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
