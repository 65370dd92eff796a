"""The state of a model: everything a pass could change, and how to restore it.

Some models permanently switch their attention on a short input, grow position tables, or cache what they read.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import nn

_TABLES = ("_modules", "_parameters", "_buffers")  # of a module, by name


class State:
    """Everything a pass could change: attributes of modules, the set of modules, buffers, configs."""

    def __init__(self, base: nn.Module) -> None:
        self._base = base
        self._modules = dict(base.named_modules())
        self._saved = {path: _attributes(module) for path, module in self._modules.items()}
        self._buffers = [(buffer, buffer.clone()) for buffer in base.buffers()]
        configs = [c for m in self._modules.values() if (c := getattr(m, "config", None)) is not None]
        self._configs = {id(c): (c, dict(vars(c))) for c in configs if hasattr(c, "__dict__")}

    def changed(self) -> tuple[str, ...]:
        """Names of everything that has changed."""
        names = [
            f"{path}.{name}".lstrip(".")
            for path, module in self._modules.items()
            for name in _changed(self._saved[path], _attributes(module))
        ]
        names += [f"config.{name}" for c, saved in self._configs.values() for name in _changed(saved, dict(vars(c)))]
        if any(not _equal(buffer, copy) for buffer, copy in self._buffers):
            names.append("buffers")
        return tuple(names)

    def restore(self) -> None:
        """Restore everything."""
        for path, module in self._modules.items():
            _put_back(module, self._saved[path])
        for config, saved in self._configs.values():
            vars(config).clear()
            vars(config).update(saved)
        for buffer, copy in self._buffers:
            if not _equal(buffer, copy):
                buffer.copy_(copy)


@contextmanager
def unchanged(base: nn.Module) -> Iterator[State]:
    """Context manager: afterwards the model and all random states are as before."""
    import torch

    state, python, numpy = State(base), random.getstate(), np.random.get_state()  # noqa: NPY002 what models use
    devices = {parameter.device for parameter in base.parameters() if parameter.is_cuda}
    try:
        with torch.random.fork_rng(devices):
            yield state
    finally:
        state.restore()
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _attributes(module: nn.Module) -> dict[str, Any]:
    """A module's attributes, with lists and mappings copied; without hooks, which are ours."""
    names = vars(module).keys() - _module_names() | set(_TABLES)
    return {name: _copied(vars(module)[name]) for name in names}


def _module_names() -> frozenset[str]:
    """Attributes that every torch module has."""
    from torch import nn

    return frozenset(vars(nn.Module())) - {"training"}


def _put_back(module: nn.Module, saved: Mapping[str, Any]) -> None:
    now = _attributes(module)
    for name in _changed(saved, now):
        if name in _TABLES:
            vars(module)[name].clear()
            vars(module)[name].update(saved[name])
        elif name in saved:
            vars(module)[name] = _copied(saved[name])
        else:
            del vars(module)[name]


def _copied(value: Any) -> Any:
    return type(value)(value) if type(value) in (list, dict, set) else value


def _changed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = saved.keys() | now.keys()
    return sorted(n for n in names if n not in saved or n not in now or not _same(saved[n], now[n]))


def _same(a: Any, b: Any) -> bool:
    if a is b or (getattr(a, "is_meta", False) and getattr(b, "is_meta", False)):
        return True  # offloaded weights get a new placeholder at each pass
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, int | float | str | set) and a == b


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    return a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
