"""`sae-cache rm`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sae_granary.cache.commands.shared import LocalPaths
from sae_granary.common.app import Debug, echo, expected_errors, fail


def rm(
    paths: LocalPaths,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
    debug: Debug = False,
) -> None:
    """Remove caches. Asks first; refuses one in use, and what is not a cache. Links are not followed."""
    with expected_errors(debug):
        from sae_granary.cache.format.records import blocks_of, bytes_in_blocks
        from sae_granary.cache.read.reader import open_local
        from sae_granary.cache.write.remove import check_removable, remove_cache
        from sae_granary.common.errors import GranaryError
        from sae_granary.common.quantities import byte_size

        def size_of(path: Path) -> str:
            try:
                cache = open_local(path, allow_incomplete=True)
            except GranaryError:
                return "damaged"
            size = byte_size(cache.n_bytes + bytes_in_blocks(path))
            if not cache.records and (blocks := blocks_of(path)) is not None:
                return f"{blocks.n_rows:,} rows in blocks, {size}"
            return f"{cache.n_rows:,} rows, {size}"

        sizes = {}
        for path in paths:
            check_removable(path)
            sizes[path] = size_of(path)
        for path, size in sizes.items():
            if not yes:
                try:
                    wanted = typer.confirm(f"remove {path} ({size})?")
                except typer.Abort:
                    fail(f"error: {path} was not removed: there is no terminal to confirm on; give --yes", 2)
                if not wanted:
                    echo(f"kept {path}")
                    continue
            remove_cache(path)
            echo(f"removed {path} ({size})")
