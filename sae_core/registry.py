"""Registry of variants: every module of `sae_core.variants`, and classes elsewhere that use `@register`."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, replace
from typing import Any, TypeVar

from sae_granary.common.errors import nearest
from sae_granary.sae_core.base import SAE
from sae_granary.sae_core.errors import OptionError, UnknownTypeError
from sae_granary.sae_core.options import SharedConfig
from sae_granary.sae_core.ranks.reduce import ALONE, Alone

T = TypeVar("T", bound=type[SAE])

_VARIANTS: dict[str, type[SAE]] = {}
_SHARING: set[type[SAE]] = set()


def register(name: str, *, shards_latents: bool = False, shares_passes: bool = False) -> Callable[[T], T]:
    """Class decorator: register a variant under `name` for the commands, the loader and the contract tests.

    `shards_latents`: its latents can be divided over ranks (`SAE.shards`). `shares_passes`: a step selects latents by
    `select`, decodes them, and its loss is their squared error, so that SAEs of a sweep can be decoded together
    (`shares_passes`). Neither is inherited by other variants.
    """

    def add(cls: T) -> T:
        taken = _VARIANTS.get(name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise ValueError(f"variant {name!r} is registered already, by {taken.__module__}.{taken.__qualname__}")
        cls.type_name, cls.shards_latents = name, shards_latents
        if shares_passes:
            _SHARING.add(cls)
        _VARIANTS[name] = cls
        return cls

    return add


def shares_passes(sae: SAE) -> bool:
    """Whether several SAEs of this type can be decoded together; see `register`."""
    return type(sae) in _SHARING


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


def make_config(cls: type[SAE], options: Mapping[str, Any]) -> SharedConfig:
    """Build a variant's Config from a mapping.

    Raises OptionError for an unknown or missing option (with the nearest known one) or a value out of range.
    """
    known = {spec.name: spec for spec in fields(cls.Config)}
    for name in options:
        if name not in known:
            options_of = f"{cls.type_name} has no option {name!r} (its options: {', '.join(known)})"
            raise OptionError(f"{options_of}{nearest(name, known)}")
    for name, spec in known.items():
        if name not in options and spec.default is MISSING:
            raise OptionError(f"{cls.type_name} needs option {name!r}: {spec.metadata['help']}")
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
    return cls.Config(**values)


def build(cls: type[SAE], config: SharedConfig, shards: Alone = ALONE) -> SAE:
    """Create an SAE; where `shards` divide its latents, with those of this rank."""
    sae = cls(replace(config, d_sae=config.d_sae // shards.n))
    sae.shards = shards
    return sae


def whole_config(sae: SAE) -> SharedConfig:
    """The Config of an SAE with the latents of all shards."""
    return replace(sae.config, d_sae=sae.config.d_sae * sae.shards.n)
