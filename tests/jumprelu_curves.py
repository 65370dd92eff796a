"""Twelve steps of jumprelu by each recipe; tests/data/jumprelu_curves.json holds them as they were recorded.

The curves of `tanh`, `l0` and `l0_target` are from before `constraint` became the default. Run as a script, this adds
the curves of recipes that have none.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch

from sae_granary.sae_core.variants.jumprelu import RECIPES
from sae_granary.train.config.merge import make_config
from sae_granary.train.loop import train_step
from sae_granary.train.state.run_state import Run, build_sae
from sae_granary.train.step_input import RowInput

CURVES = Path(__file__).parent / "data" / "jumprelu_curves.json"
D_IN, N_STEPS = 16, 12


def rows(n: int = 128, seed: int = 0) -> torch.Tensor:
    """Sparse mixtures of 32 directions around a mean far from zero."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(32, D_IN, generator=torch.Generator().manual_seed(99))
    weights = torch.rand(n, 32, generator=generator) * (torch.rand(n, 32, generator=generator) < 0.1)
    return 3 * weights @ directions + 0.1 * torch.randn(n, D_IN, generator=generator) + 2.0


def make_run(recipe: str, **settings: object) -> Run:
    """A run of 12 steps at its start."""
    given = {"type": "jumprelu", "recipe": recipe, "d_in": D_IN, "d_sae": 64, "l0_target": 4.0, "lr": 0.01}
    given |= {"steps": N_STEPS, "batch_size": 128, "warmup_steps": 0, "dead_after_tokens": 256}
    config = replace(make_config([{**given, **settings}]), device="cpu", compute_dtype="float32")
    sae = build_sae(config)
    sae.initialize(rows(512, 1000), torch.Generator().manual_seed(0))
    return Run.create(config, sae)


def curve(recipe: str) -> dict[str, list[float]]:
    """Loss and L0 of each step, and the sum of each parameter behind the last."""
    run = make_run(recipe)
    results = [train_step(run, RowInput({"x": rows(seed=step)}), measure=True) for step in range(N_STEPS)]
    sums = [float(p.detach().double().sum()) for _, p in sorted(run.sae.named_parameters())]
    return {"loss": [r.loss for r in results], "l0": [float(r.metrics["l0"]) for r in results], "sums": sums}


if __name__ == "__main__":
    torch.set_num_threads(1)
    known = json.loads(CURVES.read_text(encoding="utf-8")) if CURVES.is_file() else {}
    curves = {recipe: known.get(recipe) or curve(recipe) for recipe in RECIPES}
    CURVES.write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
