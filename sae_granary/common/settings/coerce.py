"""Typed values from flags, YAML and Python: text or plain values to what a dataclass field is annotated with.

Flags and YAML files (`common.settings.yaml_file`) give text: the declared type of a setting alone decides what it
means.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from sae_granary.common.errors import ConfigError, nearest
from sae_granary.common.quantities import COUNT_WORDS, parse_count
from sae_granary.common.settings.declare import problem_of
from sae_granary.common.settings.yaml_file import load_yaml
from sae_granary.common.signed import short as shortened

_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NONES = ("none", "null", "auto")


def coerce(key: str, value: Any, kind: Any, hint: Callable[[str, Any], str] | None = None) -> Any:
    """Convert a value to a type: int (1000, "10k", "5M", 1e6), float, bool, str, tuples, Literal, X | None.

    Raises ConfigError with the key, the value and what was expected, then `hint(key, value)` or the nearest choice.
    """
    try:
        return _convert(value, kind)
    except (ValueError, TypeError, OverflowError, yaml.YAMLError):
        more = (hint(key, value) if hint else "") or _nearest_choice(value, kind)
        raise ConfigError(f"{key}={shortened(value)}: expected {describe(kind)}{more}") from None


def typed_value(spec: Field[Any], value: Any, kind: Any, hint: Callable[[str, Any], str] | None = None) -> Any:
    """Return the value of a declared field in its type (`declare.kinds_of`). Raises ConfigError as `coerce` does, and
    for a value out of range.
    """
    typed = coerce(spec.name, value, kind, hint)
    if problem := problem_of(spec, typed, Any):
        raise ConfigError(problem)
    return typed


def _nearest_choice(value: Any, kind: Any) -> str:
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    return nearest(value, choices) if isinstance(value, str) else ""


def describe(annotation: Any) -> str:
    """An annotation in words."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is tuple:
        return f"a list of values ({describe(args[0])})"
    if origin in (dict, Mapping):
        return "a mapping like {k: 64}"
    words = {
        int: COUNT_WORDS,
        float: "a number",
        bool: "true or false",
        str: "text",
        Path: "path",
        type(None): "none",
    }
    return words.get(annotation, str(annotation))


def _convert(value: Any, annotation: Any) -> Any:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return _convert_union(value, args)
    if origin is Literal:
        return _one_of(value, args)
    if origin is tuple:
        return _convert_tuple(value, args)
    if origin in (dict, Mapping):
        return _mapping(value)
    if annotation is Any:
        return value
    converter = {int: _int, float: _float, bool: _bool, str: _str}.get(annotation)
    if converter is None:
        raise TypeError(f"no conversion to {annotation}")
    return converter(value)


def _convert_union(value: Any, members: tuple[Any, ...]) -> Any:
    if type(None) in members and (value is None or (isinstance(value, str) and value.lower() in _NONES)):
        return None
    for member in members:
        if member is not type(None):
            try:
                return _convert(value, member)
            except (ValueError, TypeError, OverflowError):
                continue
    raise ValueError


def _convert_tuple(value: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, str):
        inside = value[1:-1] if value[:1] + value[-1:] in ("[]", "()") else ""
        text = inside if inside and not set(inside) & set("[]()") else value  # [CLS],[SEP] are two tokens, not a list
        value = [part.strip() for part in text.split(",") if part.strip()]
    if not isinstance(value, list | tuple):
        value = [value]
    return tuple(_convert(v, args[0]) for v in value)


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = load_yaml(value)
    if not isinstance(value, Mapping):
        raise TypeError
    return {str(k): v for k, v in value.items()}


def _one_of(value: Any, choices: tuple[Any, ...]) -> Any:
    if "off" in choices and _BOOLS.get(str(value).lower()) is False:  # `wandb: false`
        return "off"
    if value in choices:
        return value
    raise ValueError


def _int(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, str):
        return parse_count(value)
    if int(value) != value:
        raise ValueError
    return int(value)


def _float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, int | str) and str(value).lower() in _BOOLS:
        return _BOOLS[str(value).lower()]
    raise ValueError


def _str(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise TypeError
