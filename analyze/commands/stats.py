"""`sae-analyze stats`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sae_granary.analyze.commands.options import takes_options
from sae_granary.analyze.commands.shared import INTERRUPTED, SAEFolder, stats_of
from sae_granary.analyze.settings import Stats
from sae_granary.common.app import Debug, Quiet, echo, expected_errors
from sae_granary.common.errors import ConfigError

if TYPE_CHECKING:
    from sae_granary.analyze.latents.stats import LatentStats
    from sae_granary.analyze.source import Source


@takes_options(Stats)
def stats(read_options: Callable[[], Stats], sae: SAEFolder, quiet: Quiet = False, debug: Debug = False) -> None:
    """Statistics of every latent over a cache: density, activations, examples, neighbors. Encodes the cache first."""
    with expected_errors(debug, interrupted=INTERRUPTED):
        options = read_options()
        if options.model is not None and not options.logits:
            raise ConfigError("--model is for --logits: the other statistics need no model")
        from sae_granary.analyze.latents.show import summary_lines

        source, found = stats_of(sae, options, quiet)
        for line in summary_lines(source.cache, found):
            echo(line)
        if options.logits:
            _add_logits(source, found, options.model)


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
