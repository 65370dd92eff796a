"""Projection, clipping, Adam and unit rows in one pass over the weights of the latents, where Triton kernels run.

Without it the four read and write W_dec, its gradient and W_enc's 20 times, with it 15 times: see
`benchmarks/RESULTS.md`. Everything else (other optimizers, other parameters, a CPU) is updated by `torch.optim`.

Shapes: F latents, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sae_granary.sae_core import SAE
from sae_granary.sae_core.kernels import takes_triton
from sae_granary.sae_core.kernels.deferred import Deferred
from sae_granary.train.optim.optimizers import started


@dataclass
class RowPass:
    """Updates the weights of the latents of one SAE. Between steps it knows only what the optimizer's state tells."""

    sae: SAE
    optimizer: torch.optim.Optimizer
    _steps: dict[nn.Parameter, tuple[Tensor, int, int]] = field(default_factory=dict)  # state, its version, its value

    @cached_property
    def matrices(self) -> dict[nn.Parameter, bool]:
        """The matrices that it updates now, and whether their rows have unit norm; empty if others must do it."""
        core = self.sae.core
        if not isinstance(self.optimizer, torch.optim.Adam) or not takes_triton(core.W_dec):
            return {}
        matrices = {core.W_dec: core.unit_decoder} | ({core.W_enc: False} if core.has_encoder else {})
        return matrices if all(_fits(_rows(p)) for p in matrices) else {}

    @contextmanager
    def takes_over(self) -> Iterator[None]:
        """Context manager: the SAE leaves the projection and the unit rows of the decoder to this pass."""
        core = self.sae.core
        core.keeps_unit_rows = not self.matrices
        try:
            yield
        finally:
            core.keeps_unit_rows = True

    def ask(self, deferred: Deferred) -> None:
        """Ask the kernels of the next backward pass for the norms that they can give on the way. Begins a step."""
        self.__dict__.pop("matrices", None)
        deferred.want_squares({_rows(p): unit for p, unit in self.matrices.items()})

    def norms(self, deferred: Deferred) -> dict[nn.Parameter, Tensor]:
        """Norms, scalars, of the gradients of the matrices, without the parts along unit-norm rows."""
        found = {}
        for p, unit in self.matrices.items():
            if p.grad is None:
                continue
            rows, grad = _rows(p.detach()), _like_rows(p)
            square = deferred.square(rows, grad) if self.sae.ranks.n == 1 else None  # else the gradients were added up
            if square is None:
                square = _triton_rows().squared_norms(grad, rows if unit else None).sum()
            found[p] = square.to(torch.float32).sqrt()
        return found

    def others(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """The parameters that it does not update."""
        own = self.matrices
        return [p for p in parameters if p not in own]

    def step(self, scale: float) -> None:
        """The optimizer's step with gradients times `scale`: of the matrices here, of the others by the optimizer.

        The gradients stay as they are. The others' have been clipped already.
        """
        own = {p: p.grad for p in self.matrices if p.grad is not None}
        groups = {p: group for group in self.optimizer.param_groups for p in group["params"] if p in own}
        for p, group in groups.items():
            rows, state = _rows(p.detach()), self._state(p)
            moments = (_rows(state["exp_avg"]), _rows(state["exp_avg_sq"]))
            numbers = self._numbers(p, group, scale)
            _triton_rows().adam_step(rows, _like_rows(p), *moments, numbers, unit=self.matrices[p])
            torch.autograd.graph.increment_version(p)
            p.grad = None
        self.optimizer.step()
        for p, grad in own.items():
            p.grad = grad

    def _state(self, p: nn.Parameter) -> dict[str, Any]:
        """The optimizer's state of a matrix."""
        is_new = p not in self.optimizer.state
        state = started(self.optimizer, p)
        if is_new:
            self._steps[p] = (state["step"], state["step"]._version, 0)
        return state

    def _numbers(self, p: nn.Parameter, group: dict[str, Any], scale: float) -> Any:
        """Those of the next step of a matrix, which is counted. The count is read once after a resume."""
        held = self.optimizer.state[p]["step"]
        known, version, count = self._steps.get(p, (held, -1, 0))
        step = 1 + (count if known is held and version == held._version else int(held))
        held.add_(1)
        self._steps[p] = (held, held._version, step)
        (beta1, beta2), lr, decoupled = group["betas"], group["lr"], group["decoupled_weight_decay"]
        decay = group["weight_decay"] * (lr if decoupled else 1.0)
        return _triton_rows().AdamStep(
            scale, lr / (1 - beta1**step), math.sqrt(1 - beta2**step), group["eps"], beta1, beta2, decay, decoupled
        )


def _rows(matrix: Tensor) -> Tensor:
    """A matrix that is stored by rows or by columns (W_enc), with what is stored together as rows (F, D)."""
    return matrix if matrix.is_contiguous() else matrix.t()


def _like_rows(p: nn.Parameter) -> Tensor:
    """The gradient of a matrix, with the layout of `_rows` of the matrix."""
    assert p.grad is not None
    return (p.grad if p.is_contiguous() else p.grad.t()).contiguous()


def _fits(rows: Tensor) -> bool:
    kernels = _triton_rows()
    return bool(kernels.takes(rows)) and len(rows) > 0 and rows.shape[1] <= kernels.MAX_UPDATED_WIDTH


def _triton_rows() -> Any:
    from sae_granary.sae_core.kernels import triton_rows  # Triton is optional

    return triton_rows
