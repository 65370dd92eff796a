"""`sae-analyze stats`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sae_granary.analyze.commands.shared import (
    INTERRUPTED,
    CacheFolder,
    Device,
    Hook,
    Incomplete,
    SAEFolder,
    stats_of,
)
from sae_granary.common.app import Debug, Quiet, echo, expected_errors
from sae_granary.common.errors import ConfigError

if TYPE_CHECKING:
    from sae_granary.analyze.latents.stats import LatentStats
    from sae_granary.analyze.source import Source


def stats(
    sae: SAEFolder,
    cache: CacheFolder = None,
    logits: Annotated[
        bool, typer.Option("--logits", help="Also which tokens each latent makes more or less likely; loads the model.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="With --logits: folder or hub id of the model. (default: the one of the cache)")
    ] = None,
    hook: Hook = "",
    device: Device = "auto",
    allow_incomplete: Incomplete = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Statistics of every latent over a cache: density, activations, examples, neighbors. Encodes the cache first."""
    with expected_errors(debug, interrupted=INTERRUPTED):
        if model is not None and not logits:
            raise ConfigError("--model is for --logits: the other statistics need no model")
        from sae_granary.analyze.latents.show import summary_lines

        source, found = stats_of(sae, cache, hook, device, allow_incomplete, quiet)
        for line in summary_lines(source.cache, found):
            echo(line)
        if logits:
            _add_logits(source, found, model)


def _add_logits(source: Source, stats: LatentStats, model: str | None) -> None:
    """Store logit effects beside the statistics; say why where there are none."""
    from sae_granary.analyze.errors import AnalyzeError
    from sae_granary.analyze.latents.logits import with_logits
    from sae_granary.analyze.latents.stats import save_stats, stats_folder
    from sae_granary.models.errors import ModelError

    try:
        more, has_norm = with_logits(source, stats, model)
    except (AnalyzeError, ModelError) as error:
        if model is not None:  # asked for by name
            raise
        echo(f"no logit effects: {error}", err=True)
        return
    save_stats(more, source, stats_folder(source))
    norm = "with the final norm's weight" if has_norm else "without the final norm"
    echo(f"logits       {stats_folder(source)}: decoder rows through the head, {norm}")
