"""`sae-cache diff`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from sae_granary.cache.commands.shared import CachePath, Json, print_json
from sae_granary.common.app import Debug, echo, expected_errors

if TYPE_CHECKING:
    from sae_granary.cache.diff import CacheDifference


def diff(first: CachePath, second: CachePath, as_json: Json = False, debug: Debug = False) -> None:
    """Compare two caches: what they were made from, and every row that both have. Exit code 1 if they differ."""
    with expected_errors(debug):
        from sae_granary.cache.diff import diff as compare
        from sae_granary.cache.format.records import blocks_of
        from sae_granary.cache.read.reader import open_local

        a, b = (open_local(path, allow_incomplete=blocks_of(path) is None) for path in (first, second))
        found = compare(a, b)
        if as_json:
            print_json(found.to_json())
        else:
            for line in _lines(found):
                echo(line)
    if not found.same:
        raise typer.Exit(1)


def _lines(found: CacheDifference) -> list[str]:
    lines = [f"{name}: {a!r} and {b!r}" for name, (a, b) in found.fields.items()]
    if found.n_rows[0] != found.n_rows[1]:
        lines.append(f"rows: {found.n_rows[0]:,} and {found.n_rows[1]:,}; the first {min(found.n_rows):,} are compared")
    lines += [f"{name}: {n:,} rows differ" for name, n in found.columns.items() if n]
    for name, hook in found.hooks.items():
        if hook.n_rows:
            size = f"by at most {hook.largest:.3g}, {hook.relative:.2e} of the norm in all"
            lines.append(f"{name}: {hook.n_rows:,} rows differ, the first is {hook.first_row:,}; {size}")
    if found.same:
        return [f"the same: {found.n_rows[0]:,} rows"]
    rows = any(found.columns.values()) or any(hook.n_rows for hook in found.hooks.values())
    return lines if rows else [*lines, f"the {min(found.n_rows):,} rows that both have are equal"]
