"""The flags of a command, from the declared fields of configs. Imports nothing heavy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_granary.common.settings.declare import BOUNDS, MAX_INT, choices_of, default_of, types_of

# Values are text: `common.settings.coerce` gives them their types, with suffixes (10k, 5M) and one way to complain.
Text, Texts, Switch, File = str | None, list[str] | None, bool | None, Path | None


def parameters_of(config: type[Any], without: Iterable[str] = ()) -> list[inspect.Parameter]:
    """Return the flags of the declared fields of a config, as parameters of a command; not given, a flag is None."""
    types, left_out = types_of(config), set(without)
    return [
        flag_parameter(
            spec.name,
            help_of(spec, types[spec.name]),
            kind=Switch if _is_switch(types[spec.name]) else Texts if spec.metadata["repeat"] else Text,
            names=names_of(spec, types[spec.name]),
            panel=spec.metadata["panel"],
            common=spec.metadata["common"],
        )
        for spec in fields(config)
        if spec.metadata and spec.name not in left_out
    ]


def flag_parameter(
    name: str, help: str, *, kind: Any = Text, names: Sequence[str] = (), panel: str = "", common: bool = False
) -> inspect.Parameter:
    """Return a flag as a parameter: `--help` shows it if it is common, `--help-all` always."""
    shown: dict[str, Any] = {"rich_help_panel": panel or None, "show_default": False, "hidden": not common}
    option = typer.Option(*(names or (long_name(name),)), help=help, **shown)
    annotation: Any = Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def file_flags(whose: str, panel: str) -> list[inspect.Parameter]:
    """Return `--config` and `--set`, by which any setting of `whose` can be given."""
    help = f"Set any setting of {whose}: key=value. Repeatable."
    return [
        flag_parameter("config", "Settings in a YAML file; flags override it.", kind=File, panel=panel, common=True),
        flag_parameter("assignments", help, kind=Texts, names=("--set",), panel=panel, common=True),
    ]


def give_flags(function: Callable[..., Any], parameters: Sequence[inspect.Parameter]) -> None:
    """Give a function of keywords the signature of these flags, for `common.app.takes_flags_of`."""
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def long_name(name: str) -> str:
    """`--a-name` of a setting a_name."""
    return f"--{name.replace('_', '-')}"


def names_of(spec: Field[Any], kind: Any) -> list[str]:
    """Return all names of a field's flag, the long one first; a switch has its `--no-` form there."""
    long = spec.metadata["flag"] or long_name(spec.name)
    if _is_switch(kind) and not spec.metadata["flag"]:
        long = f"{long}/--no-{long[2:]}"
    return [name for name in (long, spec.metadata["also"], spec.metadata["short"]) if name]


def _is_switch(kind: Any) -> bool:
    return kind in (bool, Switch)


def help_of(spec: Field[Any], kind: Any) -> str:
    """Return the help of a field's flag: its sentence, then choices or range, unit and default in brackets."""
    unit, default, choices = spec.metadata["unit"], default_words(spec), choices_of(spec, kind)
    notes = [", ".join(choices)] if choices else []
    limits = range_of(spec, BOUNDS)
    notes += [limits] if "<" in limits else []  # that a count is positive goes without saying
    if default and unit and not spec.metadata["default_words"]:
        default = f"{default} {unit}"
    elif unit:
        notes.append(f"in {unit}")
    notes += [f"default: {default}"] if default else []
    return f"{spec.metadata['help']} ({'; '.join(notes)})" if notes else str(spec.metadata["help"])


def range_of(spec: Field[Any], signs: Mapping[str, str]) -> str:
    """Return the range of a field with these signs: `>= 0, < 1`; empty if it has none."""
    limits = {sign: spec.metadata[bound] for bound, sign in signs.items()}
    return ", ".join(f"{sign} {plain(limit)}" for sign, limit in limits.items() if limit not in (None, MAX_INT))


def default_words(spec: Field[Any]) -> str:
    """Return the default of a field in words; empty where it is nothing, or a switch that is off."""
    value = default_of(spec)
    if spec.metadata["default_words"] or value is False or value in (MISSING, None, "", ()):
        return str(spec.metadata["default_words"])
    return plain(value)


def plain(value: Any) -> str:
    """Return a value as one writes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(map(plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
