"""The command line apps of all stages behave alike."""

from __future__ import annotations

import typer


def make_app(name: str, about: str) -> typer.Typer:
    """An app without commands: no arguments print the help, and an unexpected error its plain traceback."""
    return typer.Typer(
        name=name,
        help=about,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
