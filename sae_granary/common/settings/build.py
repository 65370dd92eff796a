"""Configs from settings by name: of files, flags and Python."""

from __future__ import annotations

import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any, TypeVar

from sae_granary.common.errors import ConfigError
from sae_granary.common.files import user_path
from sae_granary.common.settings.coerce import coerce
from sae_granary.common.settings.declare import declared, kinds_of, problem_of, types_of
from sae_granary.common.settings.yaml_file import Settings

T = TypeVar("T")


def build(config: type[T], given: Mapping[str, Any]) -> T:
    """Return a config of the settings that are its own.

    Raises ConfigError, with file and line for a value that comes from a file.
    """
    return config(**values_of(config, given))


def values_of(config: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are a config's own as its fields hold them, without those that are None.

    A field's own `parse` (value -> value) replaces the conversion to its type. Raises ConfigError as `build` does.
    """
    kinds, types, located = kinds_of(config), types_of(config), Settings(given).located
    values: dict[str, Any] = {}
    for name, spec in declared(config).items():
        if given.get(name) is None:
            continue
        try:
            value = _parsed(spec, given[name], kinds[name])
            if problem := problem_of(spec, value, types[name]):
                raise ConfigError(problem)
        except ConfigError as error:
            raise ConfigError(located(name, str(error))) from None
        if value is not None:
            values[name] = value
    return values


def _parsed(spec: Field[Any], value: Any, kind: Any) -> Any:
    if parse := spec.metadata.get("parse"):
        return parse(value)
    if Path in (kind, *typing.get_args(kind)):
        return user_path(
            spec.name, os.fspath(value) if isinstance(value, os.PathLike) else coerce(spec.name, value, str)
        )
    if typing.get_origin(kind) is not tuple:
        return coerce(spec.name, value, kind, _without_commas)
    items = [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    if not spec.metadata.get("commas", True):  # of a text that may hold some
        return coerce(spec.name, items, kind)
    parts = [part.strip() for item in items for part in str(item).split(",") if part.strip()]
    if items and not parts:
        raise ConfigError(f"{spec.name}={','.join(map(str, items))!r} is empty: give a value, or leave it out")
    return coerce(spec.name, parts, kind)


def _without_commas(key: str, value: Any) -> str:
    """The end of a message about `20,000`."""
    digits = value.replace(",", "") if isinstance(value, str) else ""
    return f" ({digits}, without commas?)" if digits.isdecimal() and digits != value else ""


def parse_assignments(assignments: Sequence[str], flags: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return the settings that `--set key=value` texts name.

    Raises ConfigError, also for one that is set twice, or that one of the `flags` gives another value.
    """
    out: dict[str, str] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {text!r}: expected key=value")
        name, value = key.strip().replace("-", "_"), value.strip()
        if flags and name in flags and str(flags[name]) != value:
            raise ConfigError(
                f"{name} is given twice, {flags[name]!r} by its flag and {value!r} by --set: give it once"
            )
        if name in out:
            raise ConfigError(f"--set {name} is given twice, as {out[name]!r} and {value!r}: give it once")
        out[name] = value
    return out
