"""One training step. `train.lockstep` drives the steps of several runs from one stream.

batch -> forward, losses, backward (per micro-batch) -> project, clip, step, renormalize

Shapes: B rows of a batch, D = d_in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sae_granary.sae_core import SAE, Progress
from sae_granary.sae_core.kernels.deferred import are_within, finite
from sae_granary.sae_core.metrics import Evaluator
from sae_granary.train.errors import DivergedError
from sae_granary.train.optim.asked import Asked
from sae_granary.train.optim.gradients import Gradients, add_rows, clip, norms_by_name
from sae_granary.train.optim.optimizers import set_lr
from sae_granary.train.ranks.step import sum_gradients, sum_numbers
from sae_granary.train.state.measured import Measured
from sae_granary.train.state.readback import Numbers
from sae_granary.train.state.run_state import Run
from sae_granary.train.step_input import StepInput, Terms

MAX_REJECTED_IN_ROW = 10

Buffers = list[tuple[Tensor, Tensor]]  # what a step may change, and its values before


@dataclass(frozen=True, eq=False)
class StepResult:
    """Losses, gradient norm and metrics of one optimizer step."""

    accepted: bool
    grad_norm: float = math.nan  # global, before clipping
    measured: Measured | None = None
    problem: str = ""  # of a rejected batch: what was not finite

    @property
    def losses(self) -> Mapping[str, float]:
        """Mean over micro-batches, by name, when measured."""
        return {} if self.measured is None else self.measured.losses

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """l0, fvu, ... of this batch, when measured."""
        return {} if self.measured is None else self.measured.metrics

    @property
    def details(self) -> Mapping[str, float]:
        """What the variant reports (threshold, routing ...), when measured."""
        return {} if self.measured is None else self.measured.details

    @property
    def loss(self) -> float:
        """The minimized loss."""
        return sum(losses.values()) if (losses := self.losses) else math.nan


def train_step(run: Run, batch: StepInput, *, measure: bool = False) -> StepResult:
    """Take one optimizer step on a batch and count it.

    A batch with NaN, Inf or a value larger than any that was harvested, or whose loss or gradient is NaN or Inf,
    changes no weight: it is rejected and counted.
    """
    result = _update(run, batch, measure=measure)
    if not result.accepted:
        result = StepResult(accepted=False, problem=_problem(run.sae, batch))
    run.step += 1
    run.tokens += batch.n_total
    run.rejected += not result.accepted
    if result.accepted and run.ema is not None:
        run.ema.update(run.sae)
    run.rejected_in_row = 0 if result.accepted else run.rejected_in_row + 1
    return result


def _update(run: Run, batch: StepInput, *, measure: bool) -> StepResult:
    sae, config = run.sae, run.config
    gradients, run.prepared = run.prepared, None
    losses: Mapping[str, Tensor] = {}
    measured: _Measured | None = None
    if gradients is None:
        if (taken := _take(run, batch, measure=measure)) is None:
            return StepResult(accepted=False)
        gradients, losses, measured = taken.gradients, taken.losses, taken.measured
    grad_norms = norms_by_name(sae, gradients.norms) if measured is not None else {}
    set_lr(run.optimizer, run.lr)
    run.row_pass.step(clip(run.row_pass.others(gradients.clipped), config.grad_clip, gradients.norm_in_units))
    with run.row_pass.takes_over():
        sae.after_step()
    if measured is None:
        return StepResult(True, grad_norm=gradients.norm)
    sums = sum_numbers(losses, sae.ranks)
    details = sum_numbers(measured.details, sae.ranks, measured.evaluator.n_rows / batch.n_total)
    return StepResult(True, gradients.norm, Measured(sums, details, grad_norms, measured.evaluator.of_all(sae.ranks)))


@dataclass(frozen=True, eq=False)
class _Taken:
    """A forward and backward pass, whose gradients are in `.grad`, unclipped."""

    gradients: Gradients
    losses: Mapping[str, Tensor]
    measured: _Measured | None


def _take(run: Run, batch: StepInput, *, measure: bool) -> _Taken | None:
    """Compute the gradients of a batch; None, and the run as before, where something is not finite."""
    sae, progress = run.sae, Progress(run.step, run.n_steps)
    sae.begin_step(progress)
    before = [(buffer, buffer.clone()) for buffer in run.counters]
    with _undone_without_memory(sae, before):
        taken = _gradients(run, batch, progress, measure=measure)
        if taken is not None and not taken.gradients.fits:
            _restore(before)
            taken = _gradients(run, batch, progress, measure=measure, exact=True)
    if taken is None or not taken.gradients.finite:
        # Earlier micro-batches of a rejected batch changed counters and thresholds.
        _restore(before)
        return None
    return taken


def _gradients(run: Run, batch: StepInput, progress: Progress, *, measure: bool, exact: bool = False) -> _Taken | None:
    """Forward, backward, projection, norm; None where the host has already seen NaN or Inf.

    On a GPU the host waits once, at the end: while the device then updates the weights, the host can prepare the
    next step. `exact`: selections wait for the number of entries that they find.
    """
    sae, deferred = run.sae, run.deferred
    measured = _Measured(Evaluator(sae.d_out, sae.config.d_sae, shards=sae.shards)) if measure else None
    run.optimizer.zero_grad(set_to_none=True)
    run.row_pass.ask(deferred)
    with deferred.of_this_step(exact=exact):
        losses = _accumulate(run, batch, progress, measured)
    if losses is None:
        return None
    sum_gradients(sae, sae.ranks)
    if (asked := Asked.of(run)) is None:
        return None
    return _Taken(asked.answered(run, deferred.read(*asked.numbers)), losses, measured)


def _problem(sae: SAE, batch: StepInput) -> str:
    """What was not finite in a rejected batch, whose gradients are still there if it came that far."""
    if not sae.ranks.all(are_within(batch.bounded())):
        return "its rows hold NaN, Inf or values larger than any that was harvested"
    named = [(name, p.grad) for name, p in sae.named_parameters() if p.grad is not None]
    bad = [name for name, grad in named if not bool(torch.isfinite(grad).all())]
    return f"its rows are sound, but {f'the gradient of {bad[0]}' if bad else 'the loss'} is NaN or Inf"


class StepTooLargeError(torch.OutOfMemoryError):
    """The gradients of a step did not fit the memory; the run is as before the step, but for torch's generators."""


@contextmanager
def _undone_without_memory(sae: SAE, before: Buffers) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        if sae.ranks.n > 1 or sae.shards.n > 1:  # the others wait in a reduction of this step
            raise
        _restore(before)
        raise StepTooLargeError(str(error)) from None  # without the error, whose frames hold what was allocated


@torch.no_grad()
def _restore(before: Buffers) -> None:
    for buffer, value in before:
        buffer.copy_(value)


def _accumulate(run: Run, batch: StepInput, progress: Progress, measured: _Measured | None) -> dict[str, Tensor] | None:
    """Accumulate gradients over micro-batches in `.grad`; return None if one of them or its loss is not finite.

    On a GPU that is known to `run.deferred` only.
    """
    sae, failed = run.sae, run.deferred.failed
    sums: dict[str, Tensor] = {}
    for part in batch.split(run.config.grad_acc_steps):
        if failed(part.bounded(), sae.ranks):
            return None
        share = part.n_rows / batch.n_total
        with autocast(part.device, run.config.compute_dtype):
            terms = part.terms(sae, progress)
            losses = {name: value if share == 1.0 else value * share for name, value in terms.losses.items()}
        total = next(iter(losses.values())) if len(losses) == 1 else torch.stack(list(losses.values())).sum()
        if failed(finite(total), sae.ranks):
            return None
        total.backward()  # type: ignore[no-untyped-call]
        add_rows(run.deferred)
        sae.track(terms.out)
        if measured is not None:
            measured.update(sae, terms)
        for name, value in losses.items():
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()
    return sums


@dataclass
class _Measured:
    """Metrics of one batch, and the variant's own values (of its last micro-batch)."""

    evaluator: Evaluator
    details: Numbers = field(default_factory=dict)

    def update(self, sae: SAE, terms: Terms) -> None:
        out = terms.out
        self.evaluator.update(out.x.detach(), out.x_hat.detach(), out.codes)
        found = {**sae.monitor(out), **terms.details}  # copied, since the step may change what they are taken from
        self.details = {name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in found.items()}


def measures(run: Run) -> bool:
    """Whether the next step is measured: the first, the last, and those due by `log_every` or `eval_every`."""
    step, config = run.step + 1, run.config
    validated = config.eval_every > 0 and step % config.eval_every == 0
    return step in (1, run.n_steps) or step % config.log_every == 0 or validated


def check_progress(run: Run) -> None:
    """Raises DivergedError when too many batches in a row were rejected."""
    if run.rejected_in_row >= MAX_REJECTED_IN_ROW:
        raise DivergedError(
            f"{run.rejected_in_row} batches in a row up to step {run.step} gave NaN, Inf or absurd values and were "
            f"rejected ({run.rejected} in all): run `sae-cache verify`, or lower --lr"
        )


def autocast(device: torch.device, compute_dtype: str) -> AbstractContextManager[object]:
    """Context manager: matrix products in bfloat16 if requested."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if compute_dtype == "bfloat16" else nullcontext()
