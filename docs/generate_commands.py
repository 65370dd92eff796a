"""Write docs/commands.md from the command line apps: `make regenerate`. A test fails when the page differs from it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

PAGE = Path(__file__).with_name("commands.md")
STAGES = ("harvest", "cache", "train", "analyze")
SHARED = 10  # a command with at least so many flags of another one refers to that one instead of repeating them
EVERYWHERE = ("--help", "--help-all", "--debug")

HEAD = """# Commands

This page lists every command with its flags. It is generated from the code (`make regenerate`); the terms are in the
[glossary](concepts.md#glossary).

Every command prints its common flags with `--help`, and all of them with `--help-all` where there are more. Errors are
one line with exit code 2; `--debug` shows the traceback. `--version` prints the version. Numbers of rows and tokens
take suffixes: `10k`, `5M`, `1.5B`.
"""


@cache
def apps() -> dict[str, Any]:
    """Name of each command line program -> its group of commands."""
    return {f"sae-{stage}": typer.main.get_command(import_module(f"sae_granary.{stage}.cli").app) for stage in STAGES}


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for program, group in apps().items():
        parts.append(f"## {program}\n\n{group.help}\n")
        names = sorted(group.commands, key=lambda name: name != "run")  # `run` first: others refer to it
        seen: dict[str, dict[str, tuple[str, str]]] = {}
        for name in names:
            parts.append("\n".join(_command(program, name, group.commands[name], seen)))
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _command(program: str, name: str, command: Any, seen: dict[str, dict[str, tuple[str, str]]]) -> Iterator[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not {*p.opts} & {*EVERYWHERE}]
    yield f"### {program} {name}\n"
    yield f"```text\n{' '.join([program, name, *map(_usage, arguments), '[OPTIONS]'])}\n```\n"
    yield _prose(inspect.cleandoc(command.help or "")) + "\n"
    rows = {p.name: (_flag(p), _meaning(p)) for p in options}
    shared, base = _shared(rows, seen)
    seen[name] = rows
    if arguments:
        yield _table("argument", [(f"`{_usage(p).strip('[].')}`", _meaning(p)) for p in arguments])
    panels = sorted(dict.fromkeys(p.rich_help_panel for p in options), key=lambda panel: panel is None)
    for panel in panels:
        own = [rows[p.name] for p in options if p.rich_help_panel == panel and p.name not in shared]
        if own and len(panels) > 1:
            yield f"**{panel or 'Other'}**\n"
        if own:
            yield _table("flag", own)
    if shared:
        anchor = f"[`{program} {base}`](#{program}-{base})"
        if shared == set(seen[base]):
            yield f"All flags of {anchor} apply too.\n"
        else:
            flags = ", ".join(rows[key][0] for key in rows if key in shared)
            yield f"These flags are the same as those of {anchor}: {flags}.\n"


def _shared(rows: dict[str, tuple[str, str]], seen: dict[str, dict[str, tuple[str, str]]]) -> tuple[set[str], str]:
    """The flags that a command shares with an earlier one, and the name of that one, or none if they are few."""
    best: tuple[set[str], str] = (set(), "")
    for name, others in seen.items():
        same = {key for key, row in rows.items() if others.get(key) == row}
        if len(same) >= max(SHARED, len(best[0]) + 1):
            best = (same, name)
    return best


def _usage(argument: Any) -> str:
    text = (argument.metavar or argument.name).upper() + ("..." if argument.nargs == -1 else "")
    return text if argument.required else f"[{text}]"


def _flag(option: Any) -> str:
    return " ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))


def _meaning(parameter: Any) -> str:
    text = _prose(parameter.help or "")
    shown = (
        parameter.show_default and parameter.default not in (None, False, (), []) and not callable(parameter.default)
    )
    if shown and not parameter.required:
        text += f" (default: {parameter.default})"
    return text.strip()


def _prose(text: str) -> str:
    """Help text as Markdown: flags as code, signs of Markdown as they are."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else _plain(part) for part in parts)


def _plain(text: str) -> str:
    text = re.sub(r"([*<>\[\]_\\])", r"\\\1", text)
    return re.sub(r"(?<![\w-])(--[a-z][\w-]*)", r"`\1`", text)


def _table(head: str, rows: list[tuple[str, str]]) -> str:
    lines = [(head, "meaning"), ("---", "---"), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
