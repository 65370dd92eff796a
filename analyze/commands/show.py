"""`sae-analyze show`."""

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
    names_in,
    stats_of,
)
from sae_granary.common.app import Debug, Quiet, echo, expected_errors
from sae_granary.common.errors import ConfigError


def show(
    sae: SAEFolder,
    cache: CacheFolder = None,
    latent: Annotated[int | None, typer.Option("--latent", "-l", help="Number of a latent, from 0.")] = None,
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="A text to encode; may be repeated.")] = None,
    model: Annotated[
        str | None, typer.Option(help="With --text: folder or hub id of the model. (default: the one of the cache)")
    ] = None,
    hook: Hook = "",
    device: Device = "auto",
    allow_incomplete: Incomplete = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Print a latent, with its strongest examples (one per document, the active token marked), or a text's latents.

    `--latent 17` needs no model. `--text "..."` runs the texts through the model of the cache.
    """
    with expected_errors(debug, interrupted=INTERRUPTED):
        if (latent is None) == (not text):
            raise ConfigError("give either --latent or --text")
        from sae_granary.analyze.latents.show import latent_lines, text_lines

        if latent is not None:
            source, found = stats_of(sae, cache, hook, device, allow_incomplete, quiet)
            lines = latent_lines(source.cache, found, latent)
        else:
            from sae_granary.analyze.encoding.texts import encode_texts

            encoded = encode_texts(sae, text or [], cache=cache, hooks=names_in(hook), model=model, device=device)
            lines = text_lines(encoded)
        for line in lines:
            echo(line)
