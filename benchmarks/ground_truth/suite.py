"""Which SAEs are trained on which worlds, how long, how often; and the tables of the results."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.ground_truth import experiment
from benchmarks.ground_truth.generators import WORLDS, sample
from benchmarks.table import markdown

K_SPARSE = {"topk", "batchtopk", "matryoshka"}  # they are given the true number of active features
# One setting per type for all worlds; d_sae is the number of features.
TYPES: Mapping[str, Mapping[str, Any]] = {
    "vanilla": {"l1_coef": 1.0},
    "gated": {"l1_coef": 2.0},
    "jumprelu": {"recipe": "tanh", "l0_coef": 1.0, "lr": 3e-3},
    "topk": {},
    "batchtopk": {},
    "matryoshka": {},
}
TRAINING: Mapping[str, Any] = {"batch_size": 512, "lr": 1e-2, "matrix_lr_scale": 1.0, "log_every": 1000}
COLUMNS = ("mcc", "f1", "fvu", "l0", "rare", "activation_ratio", "l2_ratio")
TREE_COLUMNS = ("absorption", "carried", "missed_alone")
DATA, DICTIONARY = 2, 1  # meaning of a generator's second seed


@dataclass(frozen=True)
class Size:
    """How much is run."""

    n_rows: int
    steps: int
    seeds: Mapping[str, int]  # per world

    @classmethod
    def of(cls, *, quick: bool) -> "Size":
        """The tables of the README, or one seed and short runs."""
        seeds = {name: 1 if quick else (8 if name == "tree" else 4) for name in WORLDS}
        return cls(20_000, 300, seeds) if quick else cls(100_000, 1500, seeds)


@dataclass(frozen=True)
class Cell:
    """One world and seed, on which every type is trained."""

    world: str
    seed: int
    n_rows: int
    steps: int
    types: tuple[str, ...]


Numbers = dict[str, dict[str, float]]  # type -> metric -> value


def run_cell(cell: Cell) -> Numbers:
    """Draw a dictionary and rows, write them, train and measure every type."""
    torch.set_num_threads(1)
    world = WORLDS[cell.world](np.random.default_rng([cell.seed, DICTIONARY]))
    data = sample(world, cell.n_rows, np.random.default_rng([cell.seed, DATA]))
    out: Numbers = {}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        experiment.write_cache(path, world, data, cell.seed)
        for name in cell.types:
            settings = {"type": name, "steps": cell.steps, **TRAINING, **TYPES[name]}
            if name in K_SPARSE:
                settings["k"] = world.k
            sae = experiment.train(path, Path(folder) / "runs", world, settings, cell.seed)
            out[name] = experiment.measure(sae, path, world, data.activations)
    return out


def run(size: Size, worlds: Sequence[str], types: Sequence[str], n_processes: int) -> Iterator[tuple[Cell, Numbers]]:
    """Every cell, in order, in processes of one thread each."""
    cells = [
        Cell(name, seed, size.n_rows, size.steps, tuple(types)) for name in worlds for seed in range(size.seeds[name])
    ]
    with ProcessPoolExecutor(n_processes, mp_context=get_context("spawn")) as pool:
        yield from zip(cells, pool.map(run_cell, cells), strict=True)


def table(world: str, results: Sequence[Numbers]) -> str:
    """Mean and standard deviation over the seeds of one world."""
    columns = [*COLUMNS, *(TREE_COLUMNS if world == "tree" else ())]
    rows = [[name, *(_spread([r[name][column] for r in results]) for column in columns)] for name in results[0]]
    return f"**{world}**, {len(results)} seeds\n\n{markdown(['', *columns], rows)}"


def per_seed(results: Sequence[Numbers], column: str) -> str:
    """The values of one column, seed by seed: a mean hides that a lost parent is a quarter of all parents."""
    lines = [f"{name:<10}  " + "  ".join(f"{r[name][column]:.3f}" for r in results) for name in results[0]]
    return f"{column} by seed:\n\n" + "\n".join(f"    {line}" for line in lines)


def claims(results: Mapping[str, Sequence[Numbers]]) -> str:
    """The statements that the README makes beforehand, with what was measured."""
    lines = []
    if "tree" in results:
        nested, flat = (_mean(results["tree"], name, "absorption") for name in ("matryoshka", "batchtopk"))
        lines.append(
            _claim("tree: absorption of matryoshka <= 0.35 x batchtopk's", nested <= 0.35 * flat, nested, flat)
        )
    if "heterogeneous" in results:
        pooled, fixed = (_mean(results["heterogeneous"], name, "fvu") for name in ("batchtopk", "topk"))
        lines.append(_claim("heterogeneous: FVU of batchtopk < topk's", pooled < fixed, pooled, fixed))
    if "orthogonal" in results:
        l1, none = (_mean(results["orthogonal"], name, "activation_ratio") for name in ("vanilla", "batchtopk"))
        lines.append(
            _claim("orthogonal: L1 shrinks (vanilla < 0.9, batchtopk > 0.95)", l1 < 0.9 and none > 0.95, l1, none)
        )
    return "\n".join(lines)


def _claim(text: str, holds: bool, left: float, right: float) -> str:
    return f"- {text}: {'holds' if holds else 'DOES NOT HOLD'} ({left:.3f}, {right:.3f})"


def _mean(results: Sequence[Numbers], name: str, column: str) -> float:
    return float(np.mean([r[name][column] for r in results]))


def _spread(values: Sequence[float]) -> str:
    deviation = np.std(values, ddof=1) if len(values) > 1 else float("nan")
    return f"{np.mean(values):.3f} ± {deviation:.3f}"
