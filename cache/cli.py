"""sae-cache: list, describe and verify activation caches. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

from sae_granary.cache.commands.convert import convert
from sae_granary.cache.commands.diff import diff
from sae_granary.cache.commands.import_vectors import import_files
from sae_granary.cache.commands.info import info
from sae_granary.cache.commands.ls import ls
from sae_granary.cache.commands.rm import rm
from sae_granary.cache.commands.travel import pull, push
from sae_granary.cache.commands.verify import verify
from sae_granary.common.app import make_app

app = make_app("sae-cache", "List, describe, verify and convert activation caches.")

app.command()(ls)
app.command()(info)
app.command(name="import")(import_files)
app.command()(verify)
app.command()(diff)
app.command()(rm)
app.command()(push)
app.command()(pull)
app.command()(convert)


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
