"""Eight SAEs in one sweep beside their steps alone, and beside eight runs that each harvest for themselves.

    python -m benchmarks.sweep [--quick]

Steps alone: `train.loop.train_step` on a batch that is at hand, nothing measured, nothing logged. A sweep's step: wall
time between two lines of metrics of its first SAE, so loading, logging and measuring every tenth step count. A live
run is computed: every token that it trains on passes the model once, then comes the step; SAELens' steps are those of
PEERS.md.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.table import markdown
from sae_granary import train_sweep
from sae_granary.cache.load.loader import Loader
from sae_granary.common.process import keep_freed_memory, tuned_process
from sae_granary.harvest.config import HarvestConfig, TextConfig
from sae_granary.harvest.run import harvest_activations
from sae_granary.models.config import ModelConfig, WhereConfig
from sae_granary.train.data.run_data import RunData
from sae_granary.train.loop import train_step
from sae_granary.train.sinks.sink import BaseSink, Metrics
from sae_granary.train.state.run_state import Run, build_sae
from sae_granary.train.step_input import RowInput
from sae_granary.train.sweeps.reporter import Reporter
from sae_granary.train.sweeps.sweep import plan_sweep
from sae_granary.train.sweeps.sweep_plan import Entry

LAYER = 3
GRID = {"type": ["topk", "batchtopk"], "k": [16, 32], "seed": [0, 1]}
EVERY = 10  # steps between two lines of metrics
SAELENS_PRODUCTS = {"topk": 9.16, "batchtopk": 12.81}  # encoder products per step, with our malloc setting: PEERS.md
BATCHED_GRID = {"type": ["topk"], "k": [16, 32], "seed": [0, 1, 2, 3]}
NEVER = 10**9  # rows after which a latent is dead: AuxK stays off, as in the steps alone


@dataclass(frozen=True)
class Size:
    """Of every SAE, and the steps of the sweep."""

    d_sae: int
    batch: int = 2048
    steps: int = 50


def run(quick: bool) -> str:
    with tempfile.TemporaryDirectory() as name:
        cache = Path(name) / "cache"
        rows_per_second = _harvest(cache, 20_000 if quick else 40_000)
        return tables(cache, rows_per_second, Size(3072 if quick else 12_288))


def _harvest(path: Path, n_tokens: int) -> float:
    """Harvest the demo text; rows per second, the start included."""
    where, text = WhereConfig(layers=(LAYER,)), TextConfig("demo")
    config = HarvestConfig(ModelConfig("demo"), where, text, out=path, max_tokens=n_tokens)
    keep_freed_memory()
    return n_tokens / harvest_activations(config, quiet=True).seconds


def tables(cache: Path, rows_per_second: float, size: Size, device: str = "auto", *, batched: bool = False) -> str:
    """Return the tables of a sweep on a cache that was harvested at a given speed; its runs are written beside it.

    `batched`: one of topk SAEs that share passes.
    """
    grid = BATCHED_GRID if batched else GRID
    settings = {"cache": str(cache), "d_sae": size.d_sae, "batch_size": size.batch, "steps": size.steps}
    settings |= {"dead_after_tokens": NEVER, "log_every": EVERY, "eval_rows": size.batch, "warmup_steps": 0}
    settings |= {"save_every": 0, "device": device}
    where = {"runs_dir": str(cache.parent), "name": "batched" if batched else "sweep"}
    plan = plan_sweep(grid, settings, batched=batched, **where)
    runs = [RunData.reopen(entry.config, group.record) for group in plan.groups for entry in group.entries]
    with Loader(runs[0].cache, batch_size=size.batch, device=runs[0].config.device) as loader:
        batches = (batch.x for batch in loader if isinstance(batch.x, Tensor))
        clock = _Clock(_alone(runs, next(batches)), batches)
        with tuned_process("auto"):
            result = train_sweep(grid, settings, batched=batched, **where, reporter=clock)
    assert not result.failures, result.failures
    product, n = clock.alone("product"), len(plan.entries)
    total = sum(clock.alone(entry.name) for entry in plan.entries)
    shape = f"d_in {runs[0].cache.hook(runs[0].config.hook[0]).d_in}, d_sae {size.d_sae}, batch {size.batch}"
    title = f"{'Batched sweep' if batched else 'Sweep'}: {n} SAEs of {shape}, fp32, {size.steps} steps."
    rows = [[f"{n} steps alone (limit)", f"{total * 1e3:.0f}", "1.00"]]
    rows.append(["one step of the sweep: loading, logging, measuring", f"{clock.per_step * 1e3:.0f}"])
    rows[-1].append(f"{clock.per_step / total:.2f}")
    on_cpu = runs[0].config.device == "cpu"  # where PEERS.md measured them
    theirs = sum(SAELENS_PRODUCTS[entry.config.type] for entry in plan.entries) * product if on_cpu else None
    steps = markdown(["", "ms", "of the limit"], rows)
    costs = _costs(rows_per_second, clock.per_step, total, theirs, n, math.ceil(1e6 / size.batch))
    return f"{title}\n\n{steps}\n\n{costs}"


def _costs(rows_per_second: float, sweep: float, total: float, theirs: float | None, n: int, n_steps: int) -> str:
    """Seconds for a million tokens per SAE."""
    harvest = 1e6 / rows_per_second
    lines = [
        ("one harvest, one sweep", harvest, sweep * n_steps),
        (f"{n} live runs with our steps (computed)", n * harvest, total * n_steps),
    ]
    if theirs is not None:
        lines.append((f"{n} live runs with SAELens' steps (computed)", n * harvest, theirs * n_steps))
    first = lines[0][1] + lines[0][2]
    rows = [[name, f"{h:,.0f}", f"{t:,.0f}", f"{h + t:,.0f}", f"{(h + t) / first:.2f}"] for name, h, t in lines]
    title = (
        f"Seconds for {n} SAEs of a million tokens each; the harvest makes {rows_per_second:,.0f} tokens per second."
    )
    return f"{title}\n\n{markdown(['', 'harvest', 'training', 'sum', 'times ours'], rows)}"


Step = Callable[[Tensor], object]


def _alone(runs: Sequence[RunData], x: Tensor) -> dict[str, Step]:
    """One step of each, and the encoder product, by name."""
    steps: dict[str, Step] = {}
    for data in runs:
        sae = build_sae(data.config)
        sae.initialize(x.cpu(), torch.Generator().manual_seed(0))
        steps[str(data.config.name)] = _stepper(Run.create(data.config, sae))
    d_in, d_sae = x.shape[1], sae.config.d_sae
    W_enc, bias = torch.randn(d_in, d_sae, device=x.device), torch.zeros(d_sae, device=x.device)
    return {"product": lambda x: torch.addmm(bias, x, W_enc), **steps}


def _stepper(run: Run) -> Step:
    return lambda x: train_step(run, RowInput({"x": x}))


class _Clock(Reporter):
    """At every line of metrics of the sweep's first SAE: the wall time since the last one, then the steps alone.

    So both are taken in turn, and what else the machine does hits them alike.
    """

    def __init__(self, steps: Mapping[str, Step], batches: Iterator[Tensor]) -> None:
        self._steps, self._batches = steps, batches
        self._alone: dict[str, list[float]] = {name: [] for name in steps}
        self._sweep: list[float] = []
        self._first: str | None = None

    def sinks(self, entry: Entry) -> Sequence[BaseSink]:
        """The clock ticks with the first SAE."""
        self._first = self._first or entry.name
        return [_Ticks(self)] if entry.name == self._first else []

    def tick(self, n_steps: int) -> None:
        """n_steps of the sweep have passed since the last tick; 0 at its start."""
        _wait()
        if n_steps:
            self._sweep.append((time.perf_counter() - self._since) / n_steps)
        x = next(self._batches)
        for name, step in self._steps.items():
            start = time.perf_counter()
            step(x)
            _wait()
            if n_steps:
                self._alone[name].append(time.perf_counter() - start)
        self._since = time.perf_counter()

    @property
    def per_step(self) -> float:
        """Median seconds of a step of the sweep."""
        return statistics.median(self._sweep)

    def alone(self, name: str) -> float:
        """Median seconds of a step alone."""
        return statistics.median(self._alone[name])


class _Ticks(BaseSink):
    essential = True  # a sink that fails would be left out of the sweep, and the table without its times

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock

    def metrics(self, metrics: Metrics) -> None:
        """Lines come at step 1 and at every tenth."""
        step = int(metrics["step"])
        self._clock.tick(EVERY if step > EVERY else step - 1)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.sweep", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the latents")
    quick = parser.parse_args().quick
    print(f"{machine.describe()}\n\n{run(quick)}")


if __name__ == "__main__":
    main()
