"""Declare a setting once, as a dataclass field, and check the values of a config. Standard library alone."""

from __future__ import annotations

import math
import operator
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from sae_granary.common.errors import ConfigError, GranaryError, nearest
from sae_granary.common.signed import short as shortened

MAX_INT = 2**63 - 1
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}  # how `setting` and people write them
_HOLDS = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}


def setting(
    default: Any = MISSING,
    *,
    help: str,
    section: str = "",
    panel: str = "",
    unit: str = "",
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[str] | None = None,
    short: str = "",
    flag: str = "",
    also: str = "",
    common: bool = False,
    repeat: bool = False,
    default_words: str = "",
    **more: Any,
) -> Any:
    """Declare a field of a config.

    `help` is one sentence, without unit, range and default: these are added where it is shown. `unit` is in the plural
    (rows, steps). `section` is the one of the YAML file, and `panel` the one of the help (default: the section's name).
    The flag is `--a-name` of the field a_name unless `flag` says otherwise; `short` and `also` are further names, and
    a flag with `repeat` may be given several times. `--help` shows those with `common`, `--help-all` all.
    `default_words` say what a default of None, or one that depends on other settings, means.
    `check` enforces the range. Further keywords are kept in the field's metadata.
    """
    metadata = {
        "help": help, "section": section, "panel": panel or section.capitalize(), "unit": unit,
        "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": None if choices is None else tuple(choices),
        "short": short, "flag": flag, "also": also, "common": common, "repeat": repeat,
        "default_words": default_words, **more,
    }  # fmt: skip
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def types_of(cls: type[Any]) -> Mapping[str, Any]:
    """Return the declared type of each field; none where annotations name what is not global."""
    return _types_of(cls)  # type: ignore[arg-type]


@cache
def _types_of(cls: Any) -> Mapping[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError:
        return {}


def kinds_of(cls: type[Any]) -> dict[str, Any]:
    """Return the type of each field as `coerce` takes it: a Literal where the field declares choices."""
    types = types_of(cls)
    choices = {spec.name: spec.metadata.get("choices") for spec in fields(cls)}
    return {name: Literal.__getitem__(values) if values else types[name] for name, values in choices.items()}


def choices_of(spec: Field[Any], kind: Any) -> tuple[str, ...]:
    """Return the values that a field may take, if it declares or its type lists them."""
    listed = get_args(kind) if get_origin(kind) is Literal else ()
    return tuple(spec.metadata["choices"] or listed)


def declared(*configs: type[Any]) -> dict[str, Field[Any]]:
    """Return the declared fields of configs by name."""
    return {spec.name: spec for config in configs for spec in fields(config) if spec.metadata}


def default_of(spec: Field[Any]) -> Any:
    """Return the default of a field, MISSING if it has none."""
    return spec.default if spec.default_factory is MISSING else spec.default_factory()


def check(config: Any, error: type[GranaryError] = ConfigError) -> None:
    """Check every field of a config against its type and the range it declares.

    Raises `error` with the setting's name, its value and what was expected.
    """
    types = types_of(type(config))
    for spec in fields(config):
        if problem := problem_of(spec, getattr(config, spec.name), types.get(spec.name, Any)):
            raise error(problem)


def problem_of(spec: Field[Any], value: Any, kind: Any) -> str:
    """Return what is wrong with the value of a field, `k=0: expected a value > 0`; empty if nothing is."""
    named, bounds = f"{spec.name}={shortened(value)}: expected", spec.metadata
    if not _is_of(value, kind):
        return f"{named} {getattr(kind, '__name__', str(kind))}"
    if isinstance(value, Integral) and abs(int(value)) > MAX_INT:
        return f"{named} a value <= {MAX_INT}"
    if value is None or not bounds:
        return ""
    named = f"{spec.name}={value!r}: expected"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{named} a finite number"
    if bounds["choices"] is not None and value not in bounds["choices"]:
        return f"{named} one of {', '.join(bounds['choices'])}{nearest(str(value), bounds['choices'])}"
    for bound, sign in BOUNDS.items():
        if bounds[bound] is not None and not _HOLDS[bound](value, bounds[bound]):
            return f"{named} a value {sign} {bounds[bound]}"
    return ""


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value, perhaps read from JSON, has a declared type. An integer is a float."""
    inner = get_args(kind)
    if kind is Any:
        return True
    if isinstance(kind, UnionType) or get_origin(kind) is typing.Union:
        return any(_is_of(value, each) for each in inner)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple | list) and all(_is_of(each, inner[0]) for each in value)
    runtime = get_origin(kind) or kind
    return not isinstance(runtime, type) or isinstance(value, runtime)
