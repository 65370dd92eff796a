"""`sae-analyze search`."""

from __future__ import annotations

from collections.abc import Callable

from sae_granary.analyze.commands.options import takes_options
from sae_granary.analyze.commands.shared import INTERRUPTED, SAEFolder, codes_of, source_of, working
from sae_granary.analyze.settings import Search
from sae_granary.common.app import Debug, Quiet, echo, expected_errors
from sae_granary.common.errors import ConfigError


@takes_options(Search)
def search(read_options: Callable[[], Search], sae: SAEFolder, quiet: Quiet = False, debug: Debug = False) -> None:
    """Print the documents in which a latent is most active, with their kept columns.

    `--by category` first prints, for each value of that column, the share of documents in which the latent is active,
    and its lift: that share divided by the share among all documents.
    """
    with expected_errors(debug, interrupted=INTERRUPTED):
        options = read_options()
        if (latent := options.latent) is None:
            raise ConfigError("no latent was given: give its number, from 0, with --latent")
        from sae_granary.analyze.latents import search as found_by
        from sae_granary.analyze.latents.labels import check_latent

        by = options.by
        with working(options):
            source = source_of(sae, options)
            check_latent(latent, source.sae.config.d_sae)
            column = source.cache.document_column(by) if by else None  # refused before anything is encoded
            found = found_by.pool_latent(source.cache, codes_of(source, quiet), latent, options.pool)
        lines = [found_by.summary_line(found, latent, options.pool), ""]
        if column is not None:
            table = found_by.groups(found, source.cache.document_ids(), column)
            lines += [*found_by.group_lines(by, table, options.top), ""]
        for line in [*lines, *found_by.document_lines(source.cache, found, options.top)]:
            echo(line)
