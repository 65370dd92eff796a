"""`sae-analyze show`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Annotated

import typer

from sae_granary.analyze.commands.shared import (
    INTERRUPTED,
    CacheFolder,
    Device,
    Hook,
    Incomplete,
    SAEFolder,
    echo_line,
    names_in,
    stats_of,
)
from sae_granary.common.app import Debug, Quiet, expected_errors
from sae_granary.common.errors import ConfigError

if TYPE_CHECKING:
    from sae_granary.analyze.latents.show import Marked


def show(
    sae: SAEFolder,
    cache: CacheFolder = None,
    latent: Annotated[
        list[int] | None, typer.Option("--latent", "-l", help="Number of a latent, from 0; may be repeated.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="A text to encode; may be repeated.")] = None,
    model: Annotated[
        str | None, typer.Option(help="With --text: folder or hub id of the model. (default: the one of the cache)")
    ] = None,
    top: Annotated[
        int, typer.Option("--top", "-n", help="Examples of a latent (at most 10), or latents per token and text.")
    ] = 5,
    hook: Hook = "",
    device: Device = "auto",
    allow_incomplete: Incomplete = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Print a latent, with its strongest examples (one per document) and weaker ones, or the latents of a text.

    `--latent 17` needs no model; the active token is in color on a terminal, else in [[brackets]]. `--text "..."`
    runs texts through the model of the cache; the latents of each token are followed by those of the whole text.
    """
    with expected_errors(debug, interrupted=INTERRUPTED):
        if (not latent) == (not text):
            raise ConfigError("give either --latent or --text")
        from sae_granary.analyze.latents.show import latent_lines, text_lines

        if latent:
            source, found = stats_of(sae, cache, hook, device, allow_incomplete, quiet)
            each = [latent_lines(source.cache, found, number, top) for number in latent]
            lines: Iterable[str | Marked] = chain.from_iterable(each)
        else:
            from sae_granary.analyze.encoding.texts import encode_texts

            encoded = encode_texts(sae, text or [], cache=cache, hooks=names_in(hook), model=model, device=device)
            lines = text_lines(encoded, top)
        for line in lines:
            echo_line(line)
