"""Signum: steps along the sign of the momentum (Bernstein et al., arXiv 1802.04434)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class Signum(torch.optim.Optimizer):
    """m <- momentum * m + (1 - momentum) * g; p <- p * (1 - lr * weight_decay) - lr * sign(m)."""

    def __init__(
        self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take one step on the gradients that there are."""
        assert closure is None
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                p.mul_(1 - lr * decay).add_(state["momentum_buffer"].sign(), alpha=-lr)
