"""`sae-cache ls`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sae_granary.cache.commands.shared import Json, console, plain, print_json
from sae_granary.common.app import Debug, expected_errors


def ls(
    root: Annotated[Path, typer.Argument(help="Folder that holds caches.")] = Path("cache"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the caches below a folder."""
    with expected_errors(debug):
        from sae_granary.cache.read.listing import list_caches

        entries = list_caches(root)
        if as_json:
            print_json([vars(entry) for entry in entries])
            return
        if not entries:
            console().print(f"no caches in {root}; `sae-harvest run` makes one", markup=False)
            return
        from rich.table import Table

        table = Table("cache", "model", "hook points", "rows", "dtype", "size", "state")
        for entry in entries:
            table.add_row(*(plain(text) for text in entry.cells()))
        console().print(table)
        for entry in entries:
            if entry.error is not None:
                console().print(plain(entry.error, "red"), soft_wrap=True)
