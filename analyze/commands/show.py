"""`sae-analyze show`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING

from sae_granary.analyze.commands.options import takes_options
from sae_granary.analyze.commands.shared import INTERRUPTED, SAEFolder, echo_line, stats_of
from sae_granary.analyze.settings import Show
from sae_granary.common.app import Debug, Quiet, expected_errors
from sae_granary.common.errors import ConfigError

if TYPE_CHECKING:
    from sae_granary.analyze.latents.show import Marked


@takes_options(Show)
def show(read_options: Callable[[], Show], sae: SAEFolder, quiet: Quiet = False, debug: Debug = False) -> None:
    """Print a latent, with its strongest examples (one per document) and weaker ones, or the latents of a text.

    `--latent 17` needs no model; the active token is in color on a terminal, else in [[brackets]]. `--text "..."`
    runs texts through the model of the cache; the latents of each token are followed by those of the whole text.
    """
    with expected_errors(debug, interrupted=INTERRUPTED):
        options = read_options()
        if (not options.latent) == (not options.text):
            raise ConfigError("give either --latent or --text")
        from sae_granary.analyze.latents.show import latent_lines, text_lines

        if options.latent:
            source, found = stats_of(sae, options, quiet)
            each = [latent_lines(source.cache, found, number, options.top) for number in options.latent]
            lines: Iterable[str | Marked] = chain.from_iterable(each)
        else:
            from sae_granary.analyze.encoding.texts import encode_texts

            encoded = encode_texts(
                sae,
                options.text,
                cache=options.cache,
                hooks=options.hook,
                model=options.model,
                device=options.device,
            )
            lines = text_lines(encoded, options.top)
        for line in lines:
            echo_line(line)
