"""`sae-cache info`."""

from __future__ import annotations

from sae_granary.cache.commands.shared import CachePath, Json, console, plain, print_json
from sae_granary.common.app import Debug, expected_errors


def info(path: CachePath, as_json: Json = False, debug: Debug = False) -> None:
    """Describe a cache: what it was harvested from, its rows, and the statistics of each hook point."""
    with expected_errors(debug):
        from sae_granary.cache.read import render
        from sae_granary.cache.read.reader import open_local

        cache = open_local(path, allow_incomplete=True)
        statistics = {name: cache.stats(name) for name in cache.hook_points} if cache.n_rows else {}
        if as_json:
            own = {hook.name for hook in cache.manifest.hook_points}
            added = [dict(vars(hook)) for name, hook in cache.hook_points.items() if name not in own]
            told = render.as_json(cache.path, cache.manifest, cache.opened, statistics)
            print_json(told | {"added_hook_points": added, "n_bytes": cache.n_bytes})
            return
        from rich.table import Table

        table = Table(show_header=False, box=None)
        facts = cache.facts() | render.error_lines(statistics) | render.provenance_lines(cache.manifest)
        for label, value in facts.items():
            table.add_row(plain(label, "bold"), plain(value))
        console().print(table)
        if statistics:
            norms = Table("hook point", "mean |x|²", "total variance", "|x| min", "1 %", "median", "99 %", "max")
            for name, stats in statistics.items():
                norms.add_row(*(plain(cell) for cell in render.stats_cells(name, stats)))
            console().print(norms)
