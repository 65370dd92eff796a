"""`resample_every`: dead latents start again at rows that the SAE reconstructs badly, with fresh optimizer moments.

Rows are drawn with probability proportional to the square of their loss, as in Anthropic's "Towards Monosemanticity"
(October 2023), from the rows that follow in the training order. Nothing but step and seed decides what is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from sae_granary.sae_core import resample as latents_of
from sae_granary.train.state.run_state import Run
from sae_granary.train.step_input import Inputs


def is_due(run: Run) -> bool:
    """Whether dead latents are resampled behind the step that was just taken."""
    every = run.config.resample_every
    return every > 0 and run.step % every == 0 and run.step <= run.config.resample_until * run.n_steps


@torch.no_grad()
def resample_dead(run: Run, batches: Iterable[Inputs]) -> int:
    """Resample the latents that are dead now; returns how many."""
    dead = run.sae.dead_mask.nonzero().squeeze(1)
    if not len(dead):
        return 0
    parts = [(x, latents_of.row_losses(run.sae, x)) for x in batches]
    losses = torch.cat([loss for _, loss in parts]).double().cpu()
    weights = torch.where(torch.isfinite(losses), losses, 0.0).square()
    n = min(len(dead), int((weights > 0).sum()), 2**24)
    if not n:
        return 0
    generator = torch.Generator().manual_seed((run.config.init_seed or 0) ^ run.step)
    rows = torch.multinomial(weights / weights.sum(), n, replacement=False, generator=generator)
    latents_of.resample(run.sae, dead[:n], _take([x for x, _ in parts], rows))
    _forget(run, dead[:n])
    return n


def _take(parts: list[Inputs], rows: Tensor) -> Inputs:
    """Rows by number of batches one after another."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([x for x in parts if isinstance(x, Tensor)])[rows.to(first.device)]
    return {hook: torch.cat([x[hook] for x in _mappings(parts)])[rows.to(first[hook].device)] for hook in first}


def _mappings(parts: list[Inputs]) -> Iterator[Mapping[str, Tensor]]:
    yield from (x for x in parts if not isinstance(x, Tensor))


def _forget(run: Run, latents: Tensor) -> None:
    """Zero the optimizer's moments of latents; their averaged weights become the new ones."""
    axes, parameters = latents_of.latent_axes(run.sae), dict(run.sae.named_parameters())
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
