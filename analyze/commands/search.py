"""`sae-analyze search`."""

from __future__ import annotations

from typing import Annotated

import typer

from sae_granary.analyze.commands.shared import (
    INTERRUPTED,
    CacheFolder,
    Device,
    Hook,
    Incomplete,
    SAEFolder,
    codes_of,
    names_in,
)
from sae_granary.common.app import Debug, Quiet, echo, expected_errors
from sae_granary.common.errors import ConfigError


def search(
    sae: SAEFolder,
    latent: Annotated[int, typer.Option("--latent", "-l", help="Number of a latent, from 0.")],
    cache: CacheFolder = None,
    by: Annotated[
        str, typer.Option(help="A column kept by `sae-harvest run --keep-columns`: a table of its values.")
    ] = "",
    pool: Annotated[str, typer.Option(help="Activation of a document: max, mean or sum over its rows.")] = "max",
    top: Annotated[int, typer.Option("--top", "-n", help="Documents, and values of --by, to print.")] = 20,
    hook: Hook = "",
    device: Device = "auto",
    allow_incomplete: Incomplete = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Print the documents in which a latent is most active, with their kept columns.

    `--by category` first prints, for each value of that column, the share of documents in which the latent is active,
    and its lift: that share over the one of all documents.
    """
    with expected_errors(debug, interrupted=INTERRUPTED):
        from sae_granary.analyze.encoding.outputs import check_output
        from sae_granary.analyze.latents import search as found_by
        from sae_granary.analyze.latents.labels import check_latent
        from sae_granary.analyze.source import open_source
        from sae_granary.common.process import tuned_process

        check_output("granary", pool)
        if top < 1:
            raise ConfigError(f"--top is {top}, expected a number from 1")
        with tuned_process(device):
            source = open_source(sae, cache, hooks=names_in(hook), device=device, allow_incomplete=allow_incomplete)
            check_latent(latent, source.sae.config.d_sae)
            column = source.cache.document_column(by) if by else None  # refused before anything is encoded
            found = found_by.pool_latent(source.cache, codes_of(source, quiet), latent, pool)
        lines = [found_by.summary_line(found, latent, pool), ""]
        if column is not None:
            table = found_by.groups(found, source.cache.document_ids(), column)
            lines += [*found_by.group_lines(by, table, top), ""]
        for line in [*lines, *found_by.document_lines(source.cache, found, top)]:
            echo(line)
