"""Options and steps that several commands share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae_granary.common.app import echo
from sae_granary.common.errors import printable

if TYPE_CHECKING:
    from sae_granary.analyze.encoding.codes import StoredCodes
    from sae_granary.analyze.latents.show import Marked
    from sae_granary.analyze.latents.stats import LatentStats
    from sae_granary.analyze.settings import Shared
    from sae_granary.analyze.source import Source

SAEFolder = Annotated[Path, typer.Argument(help="Folder of a run, or of any SAE that can be loaded.", metavar="SAE")]
INTERRUPTED = "interrupted: run the same command again to continue"


@contextmanager
def working(options: Shared) -> Iterator[None]:
    """Context manager: the process is set up for the device, and rows are read from copies where options ask for it."""
    from sae_granary.cache.remote.stage import stage_folder, staging
    from sae_granary.common.process import tuned_process

    with tuned_process(options.device), staging(options.stage):
        if options.stage is not None:
            stage_folder()  # refuses one that is not there
        yield


def source_of(sae: Path, options: Shared) -> Source:
    """The SAE and the cache that options name."""
    from sae_granary.analyze.source import open_source

    return open_source(
        sae,
        options.cache,
        hooks=options.hook,
        device=options.device,
        allow_incomplete=options.allow_incomplete,
    )


def stats_of(sae: Path, options: Shared, quiet: bool) -> tuple[Source, LatentStats]:
    """The statistics of an SAE on a cache; computed where they are not stored yet."""
    from sae_granary.analyze.latents.stats import find_stats

    with working(options):
        source = source_of(sae, options)
        return source, find_stats(source, lambda: codes_of(source, quiet))


def codes_of(source: Source, quiet: bool) -> StoredCodes:
    """The codes of a cache; computed where they are not stored yet."""
    from sae_granary.analyze.encoding.encode import encode_cache
    from sae_granary.analyze.progress import row_progress

    with row_progress("encoding", source.cache.n_rows, quiet=quiet) as tick:
        return encode_cache(source, source.place / "codes", tick=tick)


def echo_line(line: str | Marked) -> None:
    """Print a line, its token in color on a terminal (not with NO_COLOR), else in [[brackets]]; see `echo`."""
    if isinstance(line, str) or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        echo(str(line))
    else:
        before, token, after = map(printable, line)
        typer.echo(before + typer.style(token, fg="yellow", bold=True) + after)
