"""Whole commands: a run against its step alone, and the wall clock of a command beyond its work."""

import json
import re
import subprocess
import sys
import time
from functools import partial
from typing import Any

from benchmarks.cuda_visit import models
from benchmarks.cuda_visit.clock import median_ms
from benchmarks.cuda_visit.part import tell
from benchmarks.cuda_visit.place import Place
from benchmarks.cuda_visit.saes import mixtures, settings, start
from benchmarks.cuda_visit.speed import NO_CHANGE
from benchmarks.cuda_visit.storage import cache_of
from benchmarks.table import markdown
from sae_granary import train_sae
from sae_granary.common.process import tuned_process
from sae_granary.train.loop import train_step
from sae_granary.train.sinks.sink import BaseSink, Metrics
from sae_granary.train.state.run_state import Run
from sae_granary.train.step_input import RowInput

TYPES = ("topk", "batchtopk")
RUN_SECONDS = 8.0
FIRST_STEP = 100  # from which a run is timed: everything is compiled and read ahead


class _Times(BaseSink):
    """Wall clock at every line of metrics."""

    essential = True

    def __init__(self) -> None:
        self.at: dict[int, float] = {}

    def metrics(self, metrics: Metrics) -> None:
        self.at[int(metrics["step"])] = time.perf_counter()


def run_against_step(at: Place) -> bool:
    """`sae-train run` as a user calls it, from step 100 on, beside its step on a batch that is at hand."""
    d_in, d_sae, k, batch = (32, 256, 4, 256) if at.tiny else (768, 24_576, 32, 8192)
    lines: list[list[object]] = []
    for name in TYPES:
        for dtype in ("float32",) if at.tiny else ("bfloat16", "float32"):
            x = mixtures(batch, d_in, at.device)
            run = Run.create(settings(name, at.device, NO_CHANGE, dtype), start(name, d_in, d_sae, k, {"x": x}))
            ms = median_ms(partial(train_step, run, RowInput({"x": x})), at.device)
            n_steps, times = 120 if at.tiny else min(max(500, int(1e3 * RUN_SECONDS / ms)), 5000), _Times()
            options: dict[str, Any] = {"type": name, "d_sae": d_sae, "k": k, "batch_size": batch, "steps": n_steps}
            options |= {"compute_dtype": dtype, "device": at.device, "eval_rows": batch, "log_every": 20}
            runs = str(at.folder / f"run_{dtype}")
            with tuned_process(at.device):
                train_sae(cache=str(cache_of(at)), runs_dir=runs, name=name, sinks=[times], **options)
            rate = (n_steps - FIRST_STEP) * batch / (times.at[n_steps] - times.at[FIRST_STEP])
            alone = 1e3 * batch / ms
            lines.append([name, dtype, n_steps, f"{alone:,.0f}", f"{rate:,.0f}", f"{rate / alone:.2f}"])
            tell(f"{name}, {dtype}: {rate / alone:.2f} of its step")
    print(f"Runs, d_in {d_in}, d_sae {d_sae}, k {k}, batch {batch}; from step {FIRST_STEP} on.\n")
    print(markdown(["type", "dtype", "steps", "step alone, rows/s", "run, rows/s", "of the step"], lines))
    return True


def start_up(at: Place) -> bool:
    """Wall clock of the commands minus what they report as work: of a cold and of a warm one."""
    model, text = models.bert(at), models.corpus(at, 1 if at.tiny else 50)
    n_tokens, layer = (2000, 1) if at.tiny else (1_000_000, 6)
    lines = []
    for turn in ("first",) if at.tiny else ("first", "again"):
        cache, runs = at.folder / f"started_{turn}", at.folder / f"runs_{turn}"
        flags = ["--model", model, "--dataset", text, "--layer", layer, "--max-tokens", n_tokens, "--out", cache]
        wall = _wall("harvest", "run", *flags, "--device", at.device)
        work = float(re.findall(r"finished: .* rows in ([\d.]+) s", (cache / "harvest.log").read_text())[-1])
        lines.append([f"sae-harvest run, {turn}", f"{wall:.1f}", f"{work:.1f}", f"{wall - work:.1f}"])
        flags = ["--cache", cache, "--type", "topk", "--k", 4, "--steps", 60 if at.tiny else 300]
        flags += ["--batch-size", 256 if at.tiny else 4096, "--device", at.device, "--runs-dir", runs, "--name", "run"]
        wall = _wall("train", "run", *flags)
        work = float(json.loads((runs / "run" / "summary.json").read_text())["seconds"])
        lines.append([f"sae-train run, {turn}", f"{wall:.1f}", f"{work:.1f}", f"{wall - work:.1f}"])
    print("Seconds of whole commands, the start of Python included.\n")
    print(markdown(["", "wall clock", "work reported", "beyond"], lines))
    return True


def _wall(stage: str, *arguments: object) -> float:
    start = time.perf_counter()
    command = [sys.executable, "-m", f"sae_granary.{stage}.cli", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    tell(f"{stage}: {time.perf_counter() - start:.1f} s")
    return time.perf_counter() - start
