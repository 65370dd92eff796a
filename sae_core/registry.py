"""Variants by name. Every module of `sae_core.variants` is discovered; `@register` in any other module adds to it."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import TypeVar

from sae_granary.common.errors import nearest
from sae_granary.sae_core.base import SAE
from sae_granary.sae_core.errors import UnknownTypeError

T = TypeVar("T", bound=type[SAE])

_VARIANTS: dict[str, type[SAE]] = {}


def register(name: str) -> Callable[[T], T]:
    """Class decorator: make a variant known under `name` to the commands, the loader and the contract tests."""

    def add(cls: T) -> T:
        taken = _VARIANTS.get(name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise ValueError(f"variant {name!r} is registered already, by {taken.__module__}.{taken.__qualname__}")
        cls.type_name = name
        _VARIANTS[name] = cls
        return cls

    return add


def discover() -> None:
    """Import every module of `sae_core.variants`."""
    package = importlib.import_module("sae_granary.sae_core.variants")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def names() -> list[str]:
    """Names of all variants, sorted."""
    discover()
    return sorted(_VARIANTS)


def get(name: str) -> type[SAE]:
    """Return the class of a variant.

    Raises UnknownTypeError, with the nearest known name, if there is none.
    """
    discover()
    if name not in _VARIANTS:
        known = sorted(_VARIANTS)
        raise UnknownTypeError(f"unknown type {name!r} (known types: {', '.join(known)}){nearest(name, known)}")
    return _VARIANTS[name]
