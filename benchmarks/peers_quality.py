"""SAELens' own trainer against ours: held-out FVU at the same L0 and dead latents, from the same rows.

    .venv-interop/bin/python -m benchmarks.peers_quality --cache cache/demo_l3 --out benchmarks/peers_quality.md

Both read the same Loader (same rows, order, split), take the same number of steps with the same batch, learning rate,
warm-up, decay and dead window, and leave a SAELens folder; SAELens loads both and one evaluator measures them on the
held-out documents. What stays SAELens' own are its losses, its initialization and its normalization. Types with a
penalty are run with a few coefficients until the wanted L0 lies between two, then FVU is interpolated; the threshold
of batch-wise types is moved to that L0, on the held-out rows, for both.
"""

import argparse
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

import sae_lens
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from benchmarks import machine
from benchmarks.table import markdown
from sae_granary import train_sae
from sae_granary.common.process import tuned_process
from sae_granary.sae_core import Rows
from sae_granary.sae_core.codes import Codes
from sae_granary.sae_core.metrics import Evaluator
from sae_granary.train.config.merge import make_config
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.data import passes
from sae_granary.train.data.run_data import RunData
from sae_granary.train.data.streams import open_stream

ESTIMATE_BATCHES = 50  # batches that SAELens estimates its activation scale from, before it trains
MAX_RUNS = 8  # coefficients tried per type and trainer
NEAR = 0.01  # |log ratio| of L0 at which FVU is taken as it is
MAX_GAP = 1.5  # ratio of the two L0 that FVU is interpolated between


@dataclass(frozen=True)
class Recipe:
    """A type in both libraries."""

    ours: str
    theirs: str  # without TrainingSAE, or TrainingSAEConfig
    penalty: str | None = None  # our option that sets L0; None: k does
    start: float = 0.0  # its first value; both losses have the same units, so it is theirs too
    same_as: tuple[tuple[str, str], ...] = ()  # options of ours that make it the same type


RECIPES = (
    Recipe("vanilla", "Standard", "l1_coef", 5.0),
    Recipe("topk", "TopK"),
    Recipe("batchtopk", "BatchTopK"),
    Recipe("jumprelu", "JumpReLU", "l0_coef", 10.0, (("recipe", "tanh"),)),
    Recipe("gated", "Gated", "l1_coef", 5.0),
    Recipe("matryoshka", "MatryoshkaBatchTopK"),
)


@dataclass(frozen=True)
class Measured:
    """One trained SAE on the held-out rows."""

    coef: float | None
    l0: float
    fvu: float
    dead: float  # share of latents silent for the dead window when training ended
    never: float  # share that fires on no held-out row
    seconds: float
    fvu_at: float  # FVU at the wanted L0: interpolated over the runs, or by moving the threshold


def main() -> None:
    args = parse_args()
    warnings.simplefilter("ignore")
    blocks = []
    recipes = {recipe.ours: recipe for recipe in RECIPES}
    for recipe in (recipes[name] for name in args.types):
        rows = {}
        for trainer in ("SAELens", "ours"):
            rows[trainer] = measure_at(recipe, trainer, args)
            print(*line(recipe.ours, trainer, rows[trainer]), flush=True)
        blocks.append((recipe.ours, rows))
    table = render(blocks, args)
    print("\n" + table)
    if args.out:
        Path(args.out).write_text(table, encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True, help="a cache with one hook point")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--d-sae", type=int, default=1536)
    parser.add_argument("--k", type=int, default=32, help="the L0 to compare at")
    parser.add_argument("--lr", type=float, help="peak learning rate of both (default: ours)")
    parser.add_argument("--ours", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of ours alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--types", nargs="+", default=[recipe.ours for recipe in RECIPES])
    parser.add_argument("--out", help="Markdown file to write")
    return parser.parse_args()


def measure_at(recipe: Recipe, trainer: str, args: argparse.Namespace) -> Measured:
    """Train until FVU at the wanted L0 is known."""
    if recipe.penalty is None:
        return run(recipe, trainer, None, args)
    tried: list[Measured] = []
    coef = recipe.start
    while len(tried) < MAX_RUNS:
        tried.append(run(recipe, trainer, coef, args))
        print(
            f"  {recipe.ours} {trainer}: coefficient {coef:.3g} gives L0 {tried[-1].l0:.1f}",
            file=sys.stderr,
            flush=True,
        )
        low = [m for m in tried if m.l0 <= args.k]
        high = [m for m in tried if m.l0 >= args.k]
        if low and high:
            a, b = max(low, key=lambda m: m.l0), min(high, key=lambda m: m.l0)
            if b.l0 <= MAX_GAP * a.l0:
                break
            assert a.coef is not None
            assert b.coef is not None
            coef = math.sqrt(a.coef * b.coef)
            continue
        # L0 falls about as 1/coef or faster; 1.3 more, to get to the other side.
        ratio = tried[-1].l0 / args.k
        coef *= min(max(ratio * (1.3 if ratio > 1 else 1 / 1.3), 0.1), 10.0)
    nearest = min(tried, key=lambda m: abs(math.log(max(m.l0, 1e-3) / args.k)))
    if abs(math.log(max(nearest.l0, 1e-3) / args.k)) < NEAR:
        return replace(nearest, fvu_at=nearest.fvu)
    if not (low and high):
        return replace(nearest, fvu_at=math.nan)
    a, b = max(low, key=lambda m: m.l0), min(high, key=lambda m: m.l0)
    share = 0.0 if a.l0 == b.l0 else math.log(args.k / a.l0) / math.log(b.l0 / a.l0)
    fvu_at = math.exp((1 - share) * math.log(a.fvu) + share * math.log(b.fvu))
    return replace(nearest, fvu_at=fvu_at)


def run(recipe: Recipe, trainer: str, coef: float | None, args: argparse.Namespace) -> Measured:
    """Train one SAE and measure it."""
    settings: dict[str, Any] = {recipe.penalty: coef, **dict(recipe.same_as)} if recipe.penalty else {"k": args.k}
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(
            [
                {"cache": args.cache, "type": recipe.ours, "steps": args.steps, "batch_size": args.batch_size}
                | {"d_sae": args.d_sae, "seed": args.seed, "runs_dir": folder, "name": "run", "save_every": 0}
                | {"log_every": 100, "device": "cpu", "lr": args.lr, **settings},
                dict(setting.split("=", 1) for setting in args.ours),
            ]
        )
        data = RunData.open(config)
        train = train_ours if trainer == "ours" else train_theirs
        dead, seconds = train(recipe, data.config, data, Path(folder) / "run", coef)
        return evaluate(recipe, data, Path(folder) / "run", coef, dead, seconds, args.k)


def train_ours(
    recipe: Recipe, config: TrainConfig, data: RunData, folder: Path, coef: float | None
) -> tuple[float, float]:
    """Our loop as `sae-train run` calls it; returns the share of dead latents and the seconds of training."""
    with tuned_process(str(config.device)):
        summary = train_sae(config).summary
    return float(summary["dead"]), float(summary["seconds"])


def train_theirs(
    recipe: Recipe, config: TrainConfig, data: RunData, folder: Path, coef: float | None
) -> tuple[float, float]:
    """SAELens' SAETrainer over our batches; returns the share of dead latents and the seconds of training."""
    assert config.steps is not None
    assert config.lr is not None
    assert config.warmup_steps is not None
    torch.manual_seed(config.seed)
    options = lens_options(recipe, config, coef)
    cls, config_cls = (getattr(sae_lens, f"{recipe.theirs}TrainingSAE{end}") for end in ("", "Config"))
    sae = cls(config_cls(d_in=config.options["d_in"], d_sae=config.options["d_sae"], **options))
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=config.steps * config.batch_size,
            train_batch_size_samples=config.batch_size,
            lr=config.lr,
            lr_end=config.lr,  # of the constant part; the decay ends at 0
            lr_warm_up_steps=config.warmup_steps,
            lr_decay_steps=round(config.steps * config.decay_fraction),
            dead_feature_window=config.options["dead_after_tokens"] // config.batch_size,
            n_batches_for_norm_estimate=ESTIMATE_BATCHES,
        ),
        sae,
        rows_for_theirs(data),
    )
    start = time.perf_counter()
    trained = trainer.fit()
    seconds = time.perf_counter() - start
    trained.save_inference_model(folder)
    return float(trainer.dead_neurons.float().mean()), seconds


def lens_options(recipe: Recipe, config: TrainConfig, coef: float | None) -> dict[str, Any]:
    """SAELens' options of a type for our settings."""
    assert config.steps is not None
    options: dict[str, Any] = {"normalize_activations": "expected_average_only_in"}
    ours = config.options
    if recipe.ours in ("vanilla", "gated"):
        options |= {"l1_coefficient": coef, "l1_warm_up_steps": int(config.steps * ours["l1_warmup"])}
    elif recipe.ours == "jumprelu":
        options |= {"jumprelu_sparsity_loss_mode": "tanh", "l0_coefficient": coef, "l0_warm_up_steps": config.steps}
        options |= {"jumprelu_init_threshold": 0.1, "jumprelu_bandwidth": 2.0, "pre_act_loss_coefficient": 3e-6}
    else:
        options["k"] = ours["k"]
    if recipe.ours == "matryoshka":
        options["matryoshka_widths"] = [max(1, round(share * ours["d_sae"])) for share in ours["fractions"]]
    return options


def rows_for_theirs(data: RunData) -> Iterator[Tensor]:
    """The first batches for the scale, then every batch of the run from its start."""
    estimate = (only(data.inputs(batch.x)) for batch in islice(open_stream([data]), ESTIMATE_BATCHES))
    return chain(estimate, (only(data.inputs(batch.x)) for batch in open_stream([data])))


def only(rows: Rows) -> Tensor:
    """The rows of the only hook point."""
    return next(iter(rows.values()))


@torch.no_grad()
def evaluate(
    recipe: Recipe, data: RunData, folder: Path, coef: float | None, dead: float, seconds: float, k: int
) -> Measured:
    """Measure a SAELens folder on the held-out rows."""
    sae, rows = sae_lens.SAE.load_from_disk(folder), [only(x) for x in passes.evaluation(data)]
    shipped = scores(sae, rows)
    fvu_at = shipped["fvu"]
    if recipe.ours in ("batchtopk", "matryoshka"):
        pre_acts = torch.cat([sae.process_sae_in(x) @ sae.W_enc + sae.b_enc for x in rows])
        sae.threshold.fill_(pre_acts.flatten().kthvalue(pre_acts.numel() - k * len(pre_acts)).values.clamp_min(0))
        fvu_at = scores(sae, rows)["fvu"]
    return Measured(coef, shipped["l0"], shipped["fvu"], dead, shipped["never_fired"], seconds, fvu_at)


def scores(sae: Any, rows: list[Tensor]) -> dict[str, float]:
    """Our metrics of their module."""
    evaluator = Evaluator(sae.cfg.d_in, sae.cfg.d_sae)
    for x in rows:
        acts = sae.encode(x)
        evaluator.update(x, sae.decode(acts), Codes.from_dense(acts))
    return evaluator.result()


def render(blocks: list[tuple[str, dict[str, Measured]]], args: argparse.Namespace) -> str:
    header = ["type", "trainer", "coefficient", "L0", "held-out FVU", f"FVU at L0 {args.k}", "dead", "never fired", "s"]
    lines = []
    for name, rows in blocks:
        lines += [line(name, trainer, m) for trainer, m in rows.items()]
        ratio = rows["ours"].fvu_at / rows["SAELens"].fvu_at
        lines.append([name, "ours / SAELens", "", "", "", f"{ratio:.3f}", "", "", ""])
    sizes = f"{args.steps} steps of {args.batch_size} rows, d_sae {args.d_sae}, k {args.k}, seed {args.seed}"
    return f"{machine.describe()}\n\n{sizes}\n\n{markdown(header, lines)}\n"


def line(name: str, trainer: str, m: Measured) -> list[str]:
    coef = "" if m.coef is None else f"{m.coef:.3g}"
    numbers = [f"{m.l0:.1f}", f"{m.fvu:.4f}", f"{m.fvu_at:.4f}", f"{m.dead:.1%}", f"{m.never:.1%}", f"{m.seconds:.0f}"]
    return [name, trainer, coef, *numbers]


if __name__ == "__main__":
    main()
