"""Fifty steps of every variant on fixed data; the curves are recorded in tests/data/golden_losses.json.

A change that must not change numbers shows the same curves. `make regenerate` adds the curves of new variants and drops
those of removed ones; `python tests/golden_losses.py --all` records all of them again: give the reason in the commit.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from sae_granary import sae_core
from sae_granary.sae_core import Progress, Reads, registry

GOLDEN = Path(__file__).parent / "data" / "golden_losses.json"
N_STEPS = 50


def batch(seed: int, reads: Reads) -> torch.Tensor | dict[str, torch.Tensor]:
    """256 sparse mixtures of 48 directions; two views of them for variants that read several hook points."""
    directions = torch.randn(48, 24, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(256, 48, generator=generator) * (torch.rand(256, 48, generator=generator) < 0.08)
    x = 2 * weights @ directions + 0.05 * torch.randn(256, 24, generator=generator) + 1.0
    return x if reads.one_row else {"layer_1": x, "layer_2": x.flip(1) * 3}


def curve(name: str) -> list[float]:
    """Summed loss at every tenth step and at the last."""
    cls = registry.get(name)
    known = {spec.name for spec in dataclasses.fields(cls.Config)}
    options = {
        key: value
        for key, value in {"k": 4, "l0_target": 4.0, "n_hooks": 2, "dead_after_tokens": 2000}.items()
        if key in known
    }
    sae = cls(sae_core.make_config(cls, {"d_in": 24, "d_sae": 96, **options})).train()
    sae.initialize(batch(1000, cls.reads), torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(sae.parameters(), lr=5e-3)
    losses = []
    for step in range(N_STEPS):
        progress = Progress(step, N_STEPS)
        sae.begin_step(progress)
        out = sae(batch(step, cls.reads))
        total = torch.stack(list(sae.losses(out, progress).values())).sum()
        optimizer.zero_grad()
        total.backward()
        sae.track(out)
        sae.project_gradients()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        sae.after_step()
        losses.append(float(total.detach()))
    return [*losses[::10], losses[-1]]


def record(*, every: bool = False) -> None:
    """Write the file: curves that are not recorded yet, or every one again."""
    torch.set_num_threads(1)
    known = {} if every else json.loads(GOLDEN.read_text(encoding="utf-8"))
    curves = {name: known.get(name) or curve(name) for name in registry.names()}
    GOLDEN.write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record(every="--all" in sys.argv)
