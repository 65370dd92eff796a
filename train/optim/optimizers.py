"""Optimizers by name, and their state as plain tensors. A new one is an entry of `OPTIMIZERS`."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.errors import CheckpointError
from sae_granary.train.optim.signum import Signum

Parameters = list[nn.Parameter]
Groups = list[dict[str, Any]]  # each with "params" and "lr_scale", its rate over the run's


@dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters of an optimizer; see the settings of the same names."""

    lr: float  # of the first step; it is set before every step
    matrix_lr_scale: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float

    @classmethod
    def of(cls, config: TrainConfig) -> Hyperparameters:
        """Those of a resolved config."""
        assert config.lr is not None
        given = (config.matrix_lr_scale, config.weight_decay, config.beta1, config.beta2, config.eps)
        return cls(config.lr, *given)


@dataclass(frozen=True)
class Kind:
    """How an optimizer is created, and its memory in copies of the parameters."""

    make: Callable[[Groups, Hyperparameters], torch.optim.Optimizer]
    in_memory: int  # parameter, gradient, state; temporaries counted as whole copies
    on_disk: int  # parameter and state
    elementwise: bool = True  # the update of an entry depends on that entry only


def make_optimizer(parameters: Iterable[nn.Parameter], name: str, given: Hyperparameters) -> torch.optim.Optimizer:
    """Build an optimizer.

    Matrices step at `matrix_lr_scale` times the learning rate: Adam's step has the size of the rate whatever the size
    of the weights, so that rows of unit norm turn ten times slower than the rows of norm 0.1 that other trainers start
    from.
    """
    matrices, vectors = _by_shape(parameters)
    groups = [{"params": matrices, "lr_scale": given.matrix_lr_scale}, {"params": vectors, "lr_scale": 1.0}]
    return OPTIMIZERS[name].make([g for g in groups if g["params"]], given)


def _by_shape(parameters: Iterable[nn.Parameter]) -> tuple[Parameters, Parameters]:
    """Matrices, then what has one number per latent or per input."""
    given = list(parameters)
    return [p for p in given if p.ndim == 2], [p for p in given if p.ndim != 2]


def _adam(kind: type[_Adam] | type[_AdamW], groups: Groups, given: Hyperparameters) -> torch.optim.Optimizer:
    betas = (given.beta1, given.beta2)
    return kind(groups, lr=given.lr, betas=betas, eps=given.eps, weight_decay=given.weight_decay, fused=True)


def _sgd(groups: Groups, given: Hyperparameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=given.lr, momentum=given.beta1, weight_decay=given.weight_decay, fused=True)


def _signum(groups: Groups, given: Hyperparameters) -> torch.optim.Optimizer:
    return Signum(groups, given.lr, given.beta1, given.weight_decay)


def _adafactor(groups: Groups, given: Hyperparameters) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=given.lr, weight_decay=given.weight_decay)


def _muon(groups: Groups, given: Hyperparameters) -> torch.optim.Optimizer:
    return MuonAndAdam(groups, given)


def started(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> dict[str, Any]:
    """The state of a parameter, created as `torch.optim.Adam` does."""
    state: dict[str, Any] = optimizer.state[p]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
    return state


class _Direct(torch.optim.Optimizer):
    """Adam's fused kernels without what `torch.optim` does around them, which takes a host longer than the launches."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)  # its guard imports torch._dynamo: seconds

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        assert set_to_none
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take one step on the gradients that there are."""
        assert closure is None
        given = [(g, [p for p in g["params"] if p.grad is not None]) for g in self.param_groups]
        if counts := [started(self, p)["step"] for _, parameters in given for p in parameters]:
            torch._foreach_add_(counts, 1)
        for group, parameters in given:
            if not parameters:
                continue
            *tensors, steps = zip(*(_in_memory_order(p, self.state[p]) for p in parameters), strict=True)
            beta1, beta2 = group["betas"]
            numbers = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
            fused: Any = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
            fused(*tensors, [], steps, beta1=beta1, beta2=beta2, **numbers)

    step.hooked = True  # type: ignore[attr-defined]  # else torch.optim wraps it in a profiler's range


def _in_memory_order(p: nn.Parameter, state: dict[str, Any]) -> tuple[Tensor, ...]:
    """What a fused step takes; matrices that are stored by columns, as W_enc is, as their transposes.

    What is not contiguous it would copy twice: of parameter, gradient and both moments.
    """
    assert p.grad is not None
    tensors: tuple[Tensor, ...] = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
    if p.ndim == 2 and not p.is_contiguous() and p.t().is_contiguous():
        tensors = tuple(t.t() for t in tensors)
    return (*tensors, state["step"])


class _Adam(_Direct, torch.optim.Adam):
    pass


class _AdamW(_Direct, torch.optim.AdamW):
    pass


class MuonAndAdam(torch.optim.Optimizer):
    """Muon for the matrices, AdamW for the vectors, as one optimizer with one state.

    Muon's steps are scaled to the size of Adam's (`match_rms_adamw`), so that one rate suits both.
    """

    def __init__(self, groups: Groups, given: Hyperparameters) -> None:
        super().__init__(groups, {})
        matrices = [group for group in groups if group["params"][0].ndim == 2]
        rest = [group for group in groups if group["params"][0].ndim != 2]
        momentum, decay = given.beta1, given.weight_decay
        muon = torch.optim.Muon(matrices, given.lr, decay, momentum, adjust_lr_fn="match_rms_adamw")
        betas = (given.beta1, given.beta2)
        adam = torch.optim.AdamW(rest, given.lr, betas, given.eps, decay, fused=True) if rest else None
        self._parts = [muon] if adam is None else [muon, adam]
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)
        for part in self._parts:
            part.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take one step on the gradients that there are."""
        assert closure is None
        for part in self._parts:
            part.step()


OPTIMIZERS = {
    "adam": Kind(partial(_adam, _Adam), in_memory=4, on_disk=3),
    "adamw": Kind(partial(_adam, _AdamW), in_memory=4, on_disk=3),
    "sgd": Kind(_sgd, in_memory=3, on_disk=2),
    "muon": Kind(_muon, in_memory=4, on_disk=2, elementwise=False),
    "adafactor": Kind(_adafactor, in_memory=3, on_disk=1, elementwise=False),
    "signum": Kind(_signum, in_memory=4, on_disk=2),
}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


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
