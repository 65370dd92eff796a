"""jumprelu's recipe `constraint` beside batchtopk at the same L0: does L0 follow its target, and what does it cost?

python -m benchmarks.jumprelu_l0 --cache cache/demo_l3 --steps 300 1000 --seeds 0 1
python -m benchmarks.jumprelu_l0 --cache cache/demo_l3 --recipe l0_penalty --coefficients 0.03 0.3 3 30

Cells that `--cells` (JSON lines) already holds are not trained again.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks import machine
from benchmarks.table import markdown
from sae_granary import train_sae
from sae_granary.common.process import tuned_process
from sae_granary.train.config.merge import make_config
from sae_granary.train.data import passes
from sae_granary.train.data.run_data import RunData
from sae_granary.train.result.evaluate import evaluate

HEADER = ["steps", "seed", "what", "target", "L0 training rows", "L0 held-out", "FVU held-out", "dead", "seconds"]


@dataclass(frozen=True)
class Cell:
    """One SAE: what it is, and what asks for its L0."""

    cache: str
    steps: int
    batch_size: int
    d_sae: int
    seed: int
    what: str  # batchtopk, or a recipe of jumprelu
    target: float  # k, l0_target or l0_coef

    @property
    def settings(self) -> dict[str, Any]:
        sizes = {"cache": self.cache, "steps": self.steps, "batch_size": self.batch_size, "d_sae": self.d_sae}
        if self.what == "batchtopk":
            return {**sizes, "seed": self.seed, "type": "batchtopk", "k": int(self.target)}
        knob = "l0_target" if self.what in ("constraint", "l0_target") else "l0_coef"
        return {**sizes, "seed": self.seed, "type": "jumprelu", "recipe": self.what, knob: self.target}


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    cells = list(wanted(args))
    known = read(args.cells)
    for cell in cells:
        if cell not in known:
            known[cell] = measure(cell)
            if args.cells:
                with args.cells.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**asdict(cell), "numbers": known[cell]}) + "\n")
            print(*line(cell, known[cell]), flush=True)
    print(f"\n{machine.describe()}\n\n{markdown(HEADER, [line(cell, known[cell]) for cell in cells])}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True, help="a cache with one hook point")
    parser.add_argument("--steps", type=int, nargs="+", default=[300])
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--d-sae", type=int, default=3072)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--targets", type=float, nargs="+", default=[8.0, 32.0, 128.0])
    parser.add_argument("--recipe", default="constraint", help="a recipe of jumprelu")
    parser.add_argument("--coefficients", type=float, nargs="+", help="l0_coef instead of targets, without batchtopk")
    parser.add_argument("--only", action="store_true", help="without batchtopk")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cells", type=Path, help="file of finished cells, read and added to")
    return parser.parse_args()


def wanted(args: argparse.Namespace) -> Iterator[Cell]:
    """The cells in the order of the table."""
    alone = args.only or args.coefficients
    kinds = [args.recipe] if alone else [args.recipe, "batchtopk"]
    for steps, seed, target, what in product(args.steps, args.seeds, args.coefficients or args.targets, kinds):
        yield Cell(args.cache, steps, args.batch_size, args.d_sae, seed, what, target)


def read(path: Path | None) -> dict[Cell, dict[str, float]]:
    if path is None or not path.is_file():
        return {}
    entries = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    return {Cell(**{k: v for k, v in entry.items() if k != "numbers"}): entry["numbers"] for entry in entries}


def measure(cell: Cell) -> dict[str, float]:
    """Train as `sae-train run` does; L0 of inference on training rows and on held-out rows."""
    with tempfile.TemporaryDirectory() as folder, tuned_process("cpu"):
        config = make_config([{**cell.settings, "device": "cpu", "runs_dir": folder, "save_every": 0}])
        result = train_sae(config)
        on_training_rows = evaluate(result.sae, passes.calibration(RunData.open(config)))
    numbers = result.summary["eval"]
    return {
        "l0_train": on_training_rows["l0"],
        "l0": numbers["l0"],
        "fvu": numbers["fvu"],
        "dead": result.summary["dead"],
        "seconds": result.summary["seconds"],
    }


def line(cell: Cell, numbers: dict[str, float]) -> list[str]:
    l0 = [f"{numbers[name]:.4g}" for name in ("l0_train", "l0")]
    quality = [f"{numbers['fvu']:.4f}", f"{numbers['dead']:.1%}", f"{numbers['seconds']:.0f}"]
    return [str(cell.steps), str(cell.seed), cell.what, f"{cell.target:g}", *l0, *quality]


if __name__ == "__main__":
    main()
