"""`sae-cache ls`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sae_granary.cache.commands.shared import Json, console, plain, print_json
from sae_granary.common.app import Debug, echo, expected_errors, fail

Roots = Annotated[
    list[Path] | None,
    typer.Argument(help="Folders with caches. (default: cache and those of GRANARY_CACHE_DIR)", show_default=False),
]


def ls(
    roots: Roots = None,
    sort: Annotated[str, typer.Option("--sort", help="path, model, rows, size or age.")] = "path",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the caches in folders, at any depth."""
    with expected_errors(debug):
        from sae_granary.cache.format.places import VARIABLE, cache_folders
        from sae_granary.cache.read.listing import COLUMNS, SORTS, list_caches

        if sort not in SORTS:
            fail(f"error: --sort is {sort!r}, expected {', '.join(SORTS)}", 2)
        if not roots:
            named = cache_folders()
            folders = [folder for folder in named if folder.is_dir()]
            missing = f"{VARIABLE} names {_joined(named, folders)}: no such folder" if len(folders) < len(named) else ""
            roots = [Path("cache"), *folders] if Path("cache").is_dir() or not named else folders
            if not roots:
                fail(f"error: {missing}, and there is no folder cache here", 2)
            if missing:
                echo(missing, err=True)
        entries = list_caches(roots, sort=sort)
        if as_json:
            print_json([vars(entry) for entry in entries])
            return
        if not entries:
            where = ", ".join(map(str, roots))
            console().print(f"no caches in {where}; `sae-harvest run` makes one", markup=False)
            return
        from rich.table import Table

        table = Table(*COLUMNS)
        for entry in entries:
            table.add_row(*(plain(text) for text in entry.cells()))
        console().print(table)
        for entry in entries:
            if entry.error is not None:
                console().print(plain(entry.error, "red"), soft_wrap=True)


def _joined(named: list[Path], there: list[Path]) -> str:
    return ", ".join(str(folder) for folder in named if folder not in there)
