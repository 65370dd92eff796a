"""Gradients of several SAEs of equal shape in one pass: what each of their steps would launch is launched once.

A step of a small SAE on a GPU takes as long as the host takes to launch its kernels. Here S topk SAEs that train on the
same rows decode, and get the gradients of their latents, as if they were one of S * F latents, each with its own
rows; selections, norms and updates stay those of each. A step that is measured, that AuxK takes part in, or that goes
wrong is taken alone. The numbers are those of separate steps up to rounding, and do not depend on which SAEs share a
pass (on a GPU: where N * k is a multiple of the kernels' chunks of 256 entries), so that a resume is bitwise.

Shapes: S SAEs, N rows, D = d_in, F = d_sae latents of each, nnz entries of all.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Hashable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from sae_granary.cache.load.loader import Batch
from sae_granary.cache.load.whole_contexts import Contexts
from sae_granary.sae_core import SAE, Codes, Pattern, Progress
from sae_granary.sae_core.autograd import Centered, decode, encode_at
from sae_granary.sae_core.kernels import deferred
from sae_granary.sae_core.kernels.deferred import Bounded, finite
from sae_granary.sae_core.pre_acts import PreActs
from sae_granary.sae_core.registry import shares_passes
from sae_granary.train.data.streams import step_input
from sae_granary.train.loop import autocast, measures
from sae_granary.train.optim.asked import Asked
from sae_granary.train.state.run_state import Run
from sae_granary.train.step_input import RowInput
from sae_granary.train.trainer import Trainer

if TYPE_CHECKING:
    from sae_granary.sae_core.variants.topk import TopKSAE


class Batched:
    """Prepares the next steps of the runs of a group; called before each of their batches."""

    def __init__(self) -> None:
        self._stacks: dict[Hashable, _Stack] = {}

    def __call__(self, trainers: Sequence[Trainer], batch: Batch | Contexts) -> None:
        """Compute the gradients of those that can share a pass."""
        by_shape: dict[Hashable, list[Trainer]] = {}
        for trainer in trainers:
            if (shape := _shape(trainer.run)) is not None:
                by_shape.setdefault(shape, []).append(trainer)
        for shape, members in by_shape.items():
            x, runs = step_input(members[0].data, batch), [trainer.run for trainer in members]
            if not isinstance(x, RowInput):
                continue
            began = time.perf_counter()
            if (stack := self._stack(shape, runs)) is not None:
                try:
                    stack.prepare(x)
                except torch.OutOfMemoryError:  # each takes its step alone, in less memory
                    stack.give_up()
            for trainer in members:
                trainer.clock.add((time.perf_counter() - began) / len(members))

    def _stack(self, shape: Hashable, runs: Sequence[Run]) -> _Stack | None:
        """That of these runs; None without the memory for it."""
        if (stack := self._stacks.pop(shape, None)) is None or not stack.holds(runs):
            stack = None  # its memory may be needed
            with contextlib.suppress(torch.OutOfMemoryError):
                stack = _Stack(runs)
        if stack is not None:
            self._stacks[shape] = stack
        return stack


def _shape(run: Run) -> Hashable:
    """Equal for runs whose next steps can share a pass; None for a step that is taken alone."""
    config, sae = run.config, run.sae
    if not shares_passes(sae) or (options := _options(sae)).multi_topk or options.loss not in ("fvu", "mse"):
        return None
    if measures(run) or config.grad_acc_steps > 1 or config.init_from is not None or sae.ranks.n > 1:
        return None
    if options.auxk_coef > 0 and _n_dead(run):
        return None
    return (*config.hook, sae.config.d_in, sae.config.d_sae, sae.config.normalize, config.compute_dtype)


def _options(sae: SAE) -> TopKSAE.Config:
    return cast("TopKSAE.Config", sae.config)  # a type that `shares_passes` has the options of topk


def _n_dead(run: Run) -> int:
    """Number of dead latents: known after a step, read after a resume."""
    counters = run.sae.core.num_tokens_since_fired
    if (known := run.deferred.count("dead", counters)) is None:
        run.deferred.remember_count("dead", counters, known := int(run.sae.dead_mask.sum()))
    return known


class _Stack:
    """The weights of S SAEs as those of one, of which each SAE's are views from now on."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = list(runs)
        self._saes = [run.sae for run in runs]
        self._W_enc = _joined([sae.W_enc for sae in self._saes], axis=1)  # (D, S * F)
        self._W_dec = _joined([sae.W_dec for sae in self._saes], axis=0)  # (S * F, D)
        self._places = self._addresses()
        self._before: list[Tensor] = []  # counters of each before what is prepared

    def _addresses(self) -> list[int]:
        return [matrix.data_ptr() for sae in self._saes for matrix in (sae.W_enc, sae.W_dec)]

    def holds(self, runs: Sequence[Run]) -> bool:
        """Whether it is of these runs, whose weights are still views of it."""
        return self._runs == list(runs) and self._addresses() == self._places

    def give_up(self) -> None:
        """Take back what was prepared."""
        for run in self._runs:
            self._leave_out(run)

    @torch.no_grad()
    def prepare(self, x: RowInput) -> None:
        """Compute the gradients of a batch for all runs; those of a run that something is wrong with are left out."""
        bounded, n_rows = x.bounded(), x.n_rows
        self._before = []
        self._before = [sae.num_tokens_since_fired.clone() for sae in self._saes]
        if deferred.Deferred().failed(bounded):
            return
        with autocast(x.device, self._runs[0].config.compute_dtype):
            source = self._saes[0].prepare(x.rows)  # the same for all: their samples were
            centered = [sae.center(source.input).values for sae in self._saes]
            kept = [self._select(run, h, bounded) for run, h in zip(self._runs, centered, strict=True)]
            pattern, b_enc = _joined_pattern(kept), _joined([sae.encoder_bias for sae in self._saes], own=False)
            values = torch.cat([codes.values for codes in kept])
            with torch.enable_grad():
                pre_acts = encode_at(Centered(torch.cat(centered)), self._W_enc, b_enc, Codes(values, pattern))
                acts = torch.relu(pre_acts)
                recon = decode(Codes(acts, pattern), self._W_dec)
        biases, units = (
            torch.stack(each) for each in zip(*((s.b_dec, s.loss_scale.unit) for s in self._saes), strict=True)
        )
        error = recon.detach().view(len(kept), n_rows, -1) + biases[:, None] - source.target
        error_grad = error * (2 / (units * n_rows))[:, None, None]
        recon.backward(error_grad.view_as(recon))  # type: ignore[no-untyped-call]
        losses = error.square().sum((1, 2)) / (units * n_rows)
        fired = (Codes(acts.detach(), pattern).fired() > 0).chunk(len(kept))
        grads = [_parts(matrix, axis, len(kept)) for matrix, axis in ((self._W_enc, 1), (self._W_dec, 0), (b_enc, 0))]
        self._ask([*zip(self._runs, error_grad, losses, fired, *grads, strict=True)], n_rows)

    def _select(self, run: Run, h: Tensor, bounded: list[Bounded]) -> Codes:
        run.sae.begin_step(Progress(run.step, run.n_steps))
        run.optimizer.zero_grad(set_to_none=True)
        run.row_pass.ask(run.deferred)
        sae = cast("TopKSAE", run.sae)
        with run.deferred.of_this_step():
            run.deferred.failed(bounded)
            return sae.select(PreActs(h, sae.W_enc, sae.encoder_bias), sae.k)

    def _ask(self, parts: Sequence[tuple[Run, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]], n_rows: int) -> None:
        """Give each run its gradients and counters, and read what their steps need to know, at once."""
        asked: list[tuple[Run, Asked, Tensor]] = []
        for run, error_grad, loss, fired, *grads in parts:
            sae = run.sae
            sae.W_enc.grad, sae.W_dec.grad, sae.encoder_bias.grad = grads
            sae.b_dec.grad = error_grad.sum(0) - sae.W_enc @ grads[2]
            sae.num_tokens_since_fired.add_(n_rows).masked_fill_(fired, 0)
            if run.deferred.failed(finite(loss)) or (each := Asked.of(run)) is None:
                self._leave_out(run)
            else:
                asked.append((run, each, run.deferred.asked(*each.numbers)))
        found = deferred.to_host(torch.cat([numbers for *_, numbers in asked])) if asked else b""
        ends = accumulate((numbers.numel() for *_, numbers in asked), initial=0)
        for (run, each, _), (start, end) in zip(asked, pairwise(ends), strict=True):
            run.prepared = each.answered(run, run.deferred.answers(found[start:end]))
            if not (run.prepared.finite and run.prepared.fits):
                self._leave_out(run)

    def _leave_out(self, run: Run) -> None:
        """Have a run take its step alone."""
        run.prepared = None
        run.optimizer.zero_grad(set_to_none=True)
        if self._before:
            run.sae.num_tokens_since_fired.copy_(self._before[self._runs.index(run)])


def _joined(parameters: Sequence[Tensor], axis: int = 0, *, own: bool = True) -> Tensor:
    """A leaf with the values of all parameters, joined along an axis; they become views of it (`own`)."""
    joined = torch.cat([p.detach().movedim(axis, 0) for p in parameters])
    for p, part in zip(parameters, joined.chunk(len(parameters)), strict=True):
        if own:
            p.data = part.movedim(0, axis)
    return joined.movedim(0, axis).requires_grad_()


def _parts(matrix: Tensor, axis: int, n_parts: int) -> tuple[Tensor, ...]:
    """The parts of a gradient, which the matrix no longer has."""
    assert matrix.grad is not None
    parts, matrix.grad = matrix.grad.chunk(n_parts, axis), None
    return parts


def _joined_pattern(kept: Sequence[Codes]) -> Pattern:
    """The patterns of all SAEs: the rows and latents of one follow those of the one before."""
    n_rows, d_sae = kept[0].shape
    indices = torch.cat([codes.indices + s * d_sae for s, codes in enumerate(kept)])
    rows = torch.cat([codes.pattern.row_of + s * n_rows for s, codes in enumerate(kept)])
    return Pattern.of_rows(rows, indices, len(kept) * n_rows, len(kept) * d_sae)
