"""Common behavior of all command line apps: help, `--version`, one-line errors, exit codes."""

from __future__ import annotations

import errno
import functools
import inspect
import os
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup, TyperOption

from sae_granary.common.errors import GranaryError, one_line, printable, shortened
from sae_granary.common.files import shortage
from sae_granary.common.imports.postponed import postpone_unused_imports
from sae_granary.common.process import allow_open_files, share_cores
from sae_granary.common.threads import shown, waiting

if TYPE_CHECKING:
    from rich.console import Console

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]

INTERRUPTED = 130  # exit code of a process that Ctrl-C ended


def make_app(name: str, about: str) -> typer.Typer:
    """Create an app without commands: no arguments print the help, unexpected errors their plain traceback."""
    app = typer.Typer(
        name=name,
        cls=_Group,
        help=about,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(help=about)(_options)
    return app


class _Group(TyperGroup):
    """Commands whose usage errors leave out the middle of a very long argument."""

    def make_context(self, *args: Any, **more: Any) -> Any:
        with _short_usage_errors():
            return super().make_context(*args, **more)

    def invoke(self, *args: Any, **more: Any) -> Any:
        with _short_usage_errors():
            return super().invoke(*args, **more)


@contextmanager
def _short_usage_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str):  # those of typer, which have no public root
            vars(error)["message"] = shortened(message)
        raise


def _print_version(wanted: bool) -> None:
    if wanted:
        from sae_granary import __version__

        typer.echo(f"sae-granary {__version__}")
        raise typer.Exit


_Version = Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)]


def _options(version: _Version = False) -> None:
    """Options before the command."""
    allow_open_files()
    share_cores()
    postpone_unused_imports()


def _print_all_flags(context: typer.Context, wanted: bool) -> None:
    if wanted:
        for parameter in context.command.params:
            if isinstance(parameter, TyperOption):
                parameter.hidden = False
        typer.echo(context.get_help())
        raise typer.Exit


HelpAll = Annotated[
    bool, typer.Option("--help-all", help="Show all flags, also the rare.", is_eager=True, callback=_print_all_flags)
]


def takes_flags_of(shared: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: the command's first argument becomes a function that calls `shared` with its flags.

    Of these `--help` shows what is not hidden; the command gets a `--help-all` where some are, which shows all.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature, own = inspect.signature(shared), inspect.signature(command)
        names = set(signature.parameters)

        @functools.wraps(command)
        def run_command(**flags: Any) -> None:
            given = {name: value for name, value in flags.items() if name in names}
            rest = {name: value for name, value in flags.items() if name not in (*names, "help_all")}

            def read() -> Any:
                with waiting("loading the libraries"):
                    return shared(**given)

            quiet = given.get("quiet") or rest.get("quiet")
            with nullcontext() if quiet else shown(lambda line: echo(line, err=True)):
                command(read, **rest)

        hints = dict[str, Any](help_all=HelpAll)
        for part in (shared, command):
            hints |= typing.get_type_hints(part, include_extras=True)
        parameters = [*signature.parameters.values(), *list(own.parameters.values())[1:]]
        if any(getattr(option, "hidden", False) for hint in hints.values() for option in typing.get_args(hint)):
            parameters.append(inspect.Parameter("help_all", inspect.Parameter.KEYWORD_ONLY, default=False))
        run_command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [part.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[part.name]) for part in parameters]
        )
        run_command.__annotations__ = {part.name: hints[part.name] for part in parameters}
        return run_command

    return decorate


@contextmanager
def expected_errors(debug: bool, *, interrupted: str = "interrupted", remedy: str = "") -> Iterator[None]:
    """Context manager: an expected error ends the command with one red line.

    GranaryError and OSError exit with code 2, with `debug` after a traceback; `remedy` is advice for system errors. An
    interruption has its own exit code (its `exit_code`, else 130) and prints `interrupted`, or its own message if it is
    a GranaryError. A closed pipe (`... | head`) is left to the caller.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        fail(interrupted, getattr(error, "exit_code", INTERRUPTED))
    except GranaryError as error:
        if error.exit_code != GranaryError.exit_code:
            fail(str(error), error.exit_code)
        if debug:
            raise
        fail(f"error: {error}", error.exit_code)
    except OSError as error:
        if debug or error.errno == errno.EPIPE:
            raise
        fail(f"error: {_system_problem(error)}{remedy and '; '}{remedy}", GranaryError.exit_code)


def _system_problem(error: OSError) -> str:
    """What failed, and on which file."""
    if error.filename is None or not error.strerror:
        return one_line(error)
    if text := shortage(error, Path(os.fsdecode(error.filename))):
        return text
    return f"{error.filename}: {error.strerror}"


def fail(message: str, code: int) -> NoReturn:
    """Print a red line and exit."""
    typer.secho(printable(shortened(message), keep="\n"), fg="red", err=True)
    raise typer.Exit(code)


def echo(text: str, *, err: bool = False, nl: bool = True, color: str | None = None) -> None:
    """Print lines with control characters escaped: names and texts come from other people's files."""
    typer.secho(printable(text, keep="\n\t"), err=err, nl=nl, fg=color)


def make_console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console that escapes control characters; `width` applies where output is not a terminal, and nothing is cut."""
    from rich.console import Console
    from rich.segment import Segment

    class SafeConsole(Console):
        def render(self, *args: Any, **kwargs: Any) -> Iterator[Segment]:
            for part in super().render(*args, **kwargs):
                yield part if part.control else Segment(printable(part.text, keep="\n"), part.style)

    console = SafeConsole(stderr=stderr, highlight=False)
    return console if console.is_terminal or width is None else SafeConsole(stderr=stderr, highlight=False, width=width)
