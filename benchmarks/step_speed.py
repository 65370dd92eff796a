"""One training step of every type against one encoder product, the floor of a step that computes all pre-activations.

    python -m benchmarks step [--full]

A step is `train.loop.train_step`, as a run takes it, on one batch that is at hand. Sizes: d_in 384, d_sae 12288, k 32,
batch 2048, fp32. Types without a setting of L0 are measured at trained density: their biases are set so that about 64
latents per row are active. Routed types choose between two hook points. Left out: crosscoder (its encoder is as wide
as all hook points together) and matching_pursuit (k products by definition).
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields

import torch

from benchmarks.cuda_visit.saes import mixtures, rows_for
from benchmarks.table import markdown
from benchmarks.timing import interleaved
from sae_granary.common.process import keep_freed_memory
from sae_granary.sae_core import SAE, Rows, make_config, registry
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.loop import train_step
from sae_granary.train.memory.footprint import used_memory
from sae_granary.train.state.run_state import Run
from sae_granary.train.step_input import RowInput

D_IN, D_SAE, K, BATCH = 384, 12_288, 32, 2048
TRAINED_L0 = 64
DEAD_SHARE = 1 / 32  # of the latents, where AuxK is on
MEMORY_STEPS = 5
COPIES = 4  # of the parameters: themselves, gradients, Adam's two moments


def run(quick: bool) -> str:
    prepare()
    d_sae = D_SAE // 4 if quick else D_SAE
    device = "cuda" if torch.cuda.is_available() else "cpu"
    alive = {name: make_run(name, d_sae, device) for name in compared()}
    with_auxk = [name for name, run in alive.items() if getattr(run.sae.core.config, "auxk_coef", 0) > 0]
    dead = {name: make_run(name, d_sae, device, dead=True) for name in with_auxk}
    x, W_enc, b_enc = (
        mixtures(BATCH, D_IN, device),
        torch.randn(d_sae, D_IN, device=device).t(),
        torch.zeros(d_sae, device=device),
    )
    steps: dict[str, Callable[[], object]] = {"product": lambda: torch.addmm(b_enc, x, W_enc)}
    steps |= {name: stepper(run) for name, run in alive.items()}
    steps |= {f"{name} dead": stepper(run) for name, run in dead.items()}
    seconds = interleaved(steps, 5 if quick else 9)
    product = seconds["product"]
    lines = [["encoder product (limit)", f"{product * 1e3:.0f}", "1.00", "", "", "", ""]]
    for name in sorted(alive, key=lambda name: seconds[name]):
        parameters = sum(p.numel() * 4 for p in alive[name].sae.parameters())
        bound = COPIES * parameters + BATCH * d_sae * 4
        auxk = f"{seconds[f'{name} dead'] / product:.2f}" if name in dead else ""
        command = [sys.executable, "-m", "benchmarks.step_speed", name, str(d_sae)]
        memory = "" if device == "cuda" else f"{int(subprocess.check_output(command)) / 2**20:.0f}"
        cost = [f"{seconds[name] * 1e3:.0f}", f"{seconds[name] / product:.2f}", auxk]
        lines.append([name, *cost, f"{l0(alive[name]):.0f}", memory, f"{bound / 2**20:.0f}"])
    title = (
        f"Training step: d_in {D_IN}, d_sae {d_sae}, k {K}, batch {BATCH}, fp32 on {device}. With AuxK: one latent in "
        "32 is dead. Peak: what the run and its steps add to the process; sum: pre-activations, parameters, "
        "gradients, Adam."
    )
    header = ["", "ms", "encoder products", "with AuxK", "L0", "peak MiB", "sum MiB"]
    return f"{title}\n\n{markdown(header, lines)}"


def prepare() -> None:
    """Set the process as a training on a CPU sets it."""
    torch.set_flush_denormal(True)
    keep_freed_memory()


def compared() -> list[str]:
    """Types whose encoder is one product of the sizes above."""
    return [name for name in registry.names() if registry.get(name).has_encoder and name != "crosscoder"]


def inputs(name: str, device: str) -> Rows:
    """A batch as a type reads it."""
    return rows_for(name, BATCH, D_IN, device)


def make_run(name: str, d_sae: int, device: str, *, dead: bool = False) -> Run:
    """A run half-way through its steps."""
    cls = registry.get(name)
    known = {spec.name for spec in fields(cls.Config)}
    options = {"d_in": D_IN, "d_sae": d_sae} | ({"k": K} if "k" in known else {})
    options |= {"n_hooks": 2} if "n_hooks" in known else {}
    sae = cls(make_config(cls, options)).to(device)
    x = inputs(name, device)
    sae.initialize(x, torch.Generator(device=device).manual_seed(0))
    if "k" not in known and sae.config.wanted_l0 is None:
        _set_density(sae, x)
    if dead:
        _kill(sae.core)
    run = Run.create(TrainConfig(lr=1e-12, steps=10**6, device=device, type=name), sae)
    run.step = 500_000
    return run


@torch.no_grad()
def _set_density(sae: SAE, x: Rows) -> None:
    pre_acts = sae.pre_acts(sae.encoder_input({hook: part[:256] for hook, part in x.items()})).dense
    sae.encoder_bias.sub_(pre_acts.flatten()[::97].quantile(1 - TRAINED_L0 / sae.config.d_sae))


@torch.no_grad()
def _kill(sae: SAE) -> None:
    """Silent for long enough, and too weak to be selected again."""
    n_dead = int(DEAD_SHARE * sae.config.d_sae)
    sae.num_tokens_since_fired[-n_dead:] = 2 * sae.config.dead_after_tokens
    sae.W_enc[:, -n_dead:] *= 0.1


def stepper(run: Run) -> Callable[[], object]:
    x = inputs(run.config.type, run.config.device)
    return lambda: train_step(run, RowInput(x))


@torch.no_grad()
def l0(run: Run) -> float:
    """Active latents per row."""
    return run.sae(inputs(run.config.type, run.config.device)).codes.l0()


def main() -> None:
    """Print the peak memory of one type's steps in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("type", choices=registry.names())
    parser.add_argument("d_sae", type=int)
    arguments = parser.parse_args()
    prepare()
    stepper(make_run(arguments.type, 256, "cpu"))()  # libraries load what they need
    before = used_memory("cpu", restart_peak=True)
    step = stepper(make_run(arguments.type, arguments.d_sae, "cpu"))
    for _ in range(MEMORY_STEPS):
        step()
    after = used_memory("cpu")
    assert before is not None
    assert after is not None
    print(after.peak - before.now)


if __name__ == "__main__":
    main()
