"""Optimizers by name, and their state as plain tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from train.config import TrainConfig
from train.errors import CheckpointError


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Build the optimizer of a resolved config. The rate is set before every step."""
    assert config.lr is not None
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, momentum=config.beta1, weight_decay=decay, fused=True)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=config.lr, betas=betas, eps=config.eps, weight_decay=decay, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def state_tensors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter>/<quantity>` -> tensor."""
    out: dict[str, Tensor] = {}
    for parameter, name in names.items():
        for quantity, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                out[f"{name}/{quantity}"] = torch.as_tensor(value)
    return out


def load_state_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], tensors: Mapping[str, Tensor]
) -> None:
    """Restore what `state_tensors` gave. A tensor shaped like its parameter also gets its strides.

    W_enc is stored latent by latent: a fused step over tensors of unequal strides would pair the wrong elements.
    """
    by_name = {name: parameter for parameter, name in names.items()}
    state: dict[Tensor, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        name, _, quantity = key.rpartition("/")
        if name not in by_name:
            raise CheckpointError(f"the optimizer's state holds {name!r}, which this SAE does not have")
        parameter = by_name[name]
        if tensor.shape == parameter.shape and quantity != "step":
            value = torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(tensor)
        else:
            value = tensor.to(parameter.device)
        state.setdefault(parameter, {})[quantity] = value.detach()
    optimizer.state.clear()
    optimizer.state.update(state)
