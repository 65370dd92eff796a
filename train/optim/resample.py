"""`resample_every`: dead latents start again at rows that the SAE reconstructs badly, with fresh optimizer moments.

Rows are drawn with probability proportional to the square of their loss, as in Anthropic's "Towards Monosemanticity"
(October 2023), from the rows that follow in the training order. Nothing but step and seed decides what is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sae_granary.common.device import float64
from sae_granary.sae_core import SAE, Rows
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.state.run_state import Run

ENCODER_SHARE = 0.2  # of the mean norm of living latents' encoder rows: a new latent fires rarely at first


def is_due(config: TrainConfig, step: int, n_steps: int) -> bool:
    """Whether dead latents are resampled after a step."""
    every = config.resample_every
    return every > 0 and step % every == 0 and step <= config.resample_until * n_steps


@torch.no_grad()
def resample_dead(run: Run, batches: Iterable[Rows]) -> int:
    """Resample all latents that are dead now; return their number."""
    dead = run.sae.dead_mask.nonzero().squeeze(1)
    if not len(dead):
        return 0
    parts = [(x, row_losses(run.sae, x)) for x in batches]
    losses = float64(torch.cat([loss for _, loss in parts]).cpu())
    weights = torch.where(torch.isfinite(losses), losses, 0.0).square()
    n = min(len(dead), int((weights > 0).sum()), 2**24)
    if not n:
        return 0
    generator = torch.Generator().manual_seed((run.config.init_seed or 0) ^ run.step)
    rows = torch.multinomial(weights / weights.sum(), n, replacement=False, generator=generator)
    resample(run.sae, dead[:n], _take([x for x, _ in parts], rows))
    _forget(run, dead[:n])
    return n


def _take(parts: Sequence[Rows], rows: Tensor) -> Rows:
    """Rows by number of batches one after another."""
    return {hook: torch.cat([x[hook] for x in parts])[rows.to(first.device)] for hook, first in parts[0].items()}


def _forget(run: Run, latents: Tensor) -> None:
    """Zero the optimizer's moments of latents; set their averaged weights to the new ones."""
    axes, parameters = latent_axes(run.sae), dict(run.sae.named_parameters())
    for name, axis in axes.items():
        parameter = parameters[name]
        for value in run.optimizer.state.get(parameter, {}).values():
            if (
                isinstance(value, Tensor)
                and value.ndim == parameter.ndim
                and value.shape[axis] == parameter.shape[axis]
            ):
                value.index_fill_(axis, latents, 0.0)
        if run.ema is not None:
            run.ema.tensors[name].index_copy_(axis, latents, parameter.detach().index_select(axis, latents))


@torch.no_grad()
def row_losses(sae: SAE, x: Rows) -> Tensor:
    """(N,) squared error of raw rows in the normalized space."""
    out = sae(x)
    losses: Tensor = (out.source.target - out.recon).square().sum(1)
    return losses


@torch.no_grad()
def resample(sae: SAE, latents: Tensor, x: Rows) -> None:
    """Point latents (n,) at raw rows x, one each: unit decoder rows, short encoder rows, no bias, marked alive."""
    source, core = sae.prepare(x), sae.core
    target = source.target - core.b_dec
    core.W_dec[latents] = target / target.norm(dim=1, keepdim=True).clamp_min(1e-12)
    if core.has_encoder:
        alive = torch.ones(core.config.d_sae, dtype=torch.bool, device=latents.device)
        alive[latents] = False
        norms = core.W_enc.norm(dim=0)
        length = ENCODER_SHARE * (norms[alive].mean() if bool(alive.any()) else norms.mean())
        h = sae.center(source.input).values
        core.W_enc[:, latents] = (h / h.norm(dim=1, keepdim=True).clamp_min(1e-12)).t() * length
    for name, declared in core.latents.items():
        declared.reset(getattr(core, name), core.config, latents)
    core.num_tokens_since_fired[latents] = 0


def latent_axes(sae: SAE) -> dict[str, int]:
    """By parameter name, the axis that counts latents; parameters without one are left out."""
    core, axes = sae.core, {}
    names = {parameter: name for name, parameter in sae.named_parameters()}
    for own, parameter in core.named_parameters():
        if own in ("W_enc", "W_dec"):
            axes[names[parameter]] = 1 if own == "W_enc" else 0
        elif own.partition(".")[0] in core.latents:
            axes[names[parameter]] = 0
    return axes
