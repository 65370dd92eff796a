"""What the interop tests share: rows, SAEs of ours on them, and relative differences.

Shapes: N rows, D = D_IN, F = D_SAE.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from sae_granary import sae_core
from sae_granary.sae_core import SAE, Progress, SAEOutput, registry

N, D_IN, D_SAE, K = 128, 24, 96, 6
TOLERANCE = 1e-5  # of a `difference`
LAST = Progress(99, 100)  # every coefficient has reached its full value


def rows(n: int = N, seed: int = 0) -> Tensor:
    """Sparse mixtures of 48 directions with a little noise, around a mean far from zero."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(48, D_IN, generator=torch.Generator().manual_seed(99))
    weights = torch.rand(n, 48, generator=generator) * (torch.rand(n, 48, generator=generator) < 0.1)
    return 3 * weights @ directions + 0.1 * torch.randn(n, D_IN, generator=generator) + 1.0


def make(name: str, **options: object) -> SAE:
    """An SAE of ours fitted to `rows()`, with a few optimizer steps behind it: no tensor is still at its start.

    Losses are plain sums of squares in raw space unless asked otherwise: the convention of all three peers.
    """
    cls = registry.get(name)
    if "k" in {spec.name for spec in dataclasses.fields(cls.Config)}:
        options = {"k": K, **options}
    if "l0_target" in {spec.name for spec in dataclasses.fields(cls.Config)}:
        options = {"l0_target": float(K), **options}
    config = {"d_in": D_IN, "d_sae": D_SAE, "normalize": "none", "loss": "mse", **options}
    sae = cls(sae_core.make_config(cls, config))
    sae.initialize(rows(), torch.Generator().manual_seed(1))
    return train(sae)


def train(sae: SAE, n_steps: int = 10) -> SAE:
    """Take a few steps and calibrate."""
    sae.train()
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for step in range(n_steps):
        optimizer.zero_grad()
        out = sae(rows(seed=step))
        total(sae.losses(out, Progress(step, n_steps))).backward()
        sae.track(out)
        sae.project_gradients()
        optimizer.step()
        sae.after_step()
    sae.calibrate(rows(seed=step) for step in range(4))
    return sae


def total(losses: Mapping[str, Tensor]) -> Tensor:
    """What is minimized."""
    return torch.stack(list(losses.values())).sum()


def step(sae: SAE, x: Tensor, progress: Progress = LAST) -> tuple[SAEOutput, dict[str, Tensor], dict[str, Tensor]]:
    """Forward and backward in training mode: the output, the loss terms and the gradients by parameter name."""
    sae.train()
    sae.zero_grad(set_to_none=True)
    out = sae(x)
    losses = sae.losses(out, progress)
    total(losses).backward()
    grads = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    return out, {name: value.detach() for name, value in losses.items()}, grads


def difference(ours: Tensor | float, theirs: Tensor | float) -> float:
    """The largest absolute difference, relative to the largest absolute value of theirs."""
    ours, theirs = torch.as_tensor(ours).detach().double(), torch.as_tensor(theirs).detach().double()
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


def assert_equal_gradients(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Of the same parameters, by name."""
    assert set(ours) == set(theirs)
    for name, grad in theirs.items():
        assert difference(ours[name], grad) < TOLERANCE, name
