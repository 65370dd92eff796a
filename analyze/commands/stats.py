"""`sae-analyze stats`."""

from __future__ import annotations

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


def stats(
    sae: SAEFolder,
    cache: CacheFolder = None,
    hook: Hook = "",
    device: Device = "auto",
    allow_incomplete: Incomplete = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Statistics of every latent over a cache: density, activations, examples, neighbors. Encodes the cache first."""
    with expected_errors(debug, interrupted=INTERRUPTED):
        from sae_granary.analyze.latents.show import summary_lines

        for line in summary_lines(stats_of(sae, cache, hook, device, allow_incomplete, quiet)[1]):
            echo(line)
