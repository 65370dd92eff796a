"""A typer command that takes the flags of a function which several commands share, before its own."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any


def takes_flags_of(shared: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: the command's first argument becomes a function that calls `shared` with its flags."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature, own = inspect.signature(shared), inspect.signature(command)
        names = set(signature.parameters)

        @functools.wraps(command)
        def run_command(**flags: Any) -> None:
            given = {name: value for name, value in flags.items() if name in names}
            rest = {name: value for name, value in flags.items() if name not in names}
            command(lambda: shared(**given), **rest)

        hints = {name: hint for part in (shared, command) for name, hint in _hints(part).items()}
        parameters = [*signature.parameters.values(), *list(own.parameters.values())[1:]]
        run_command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [part.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[part.name]) for part in parameters]
        )
        run_command.__annotations__ = {part.name: hints[part.name] for part in parameters}
        return run_command

    return decorate


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(function, include_extras=True)
