"""`sae-analyze encode`."""

from __future__ import annotations

from pathlib import Path
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
)
from sae_granary.common.app import Debug, Quiet, echo, expected_errors


def encode(
    sae: SAEFolder,
    cache: CacheFolder = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="(default: SAE/analysis/<key of the cache>/codes)")
    ] = None,
    hook: Hook = "",
    device: Device = "auto",
    allow_incomplete: Incomplete = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the sparse codes of every row of a cache. The same command continues after an interruption."""
    with expected_errors(debug, interrupted=INTERRUPTED):
        from sae_granary.analyze.encoding.encode import encode_cache
        from sae_granary.analyze.progress import row_progress
        from sae_granary.analyze.source import open_source
        from sae_granary.common.process import tuned_process

        with tuned_process(device):
            source = open_source(sae, cache, hooks=names_in(hook), device=device, allow_incomplete=allow_incomplete)
            with row_progress("encoding", source.cache.n_rows, quiet=quiet) as tick:
                codes = encode_cache(source, source.place / "codes" if out is None else out, tick=tick)
        n_rows, d_sae = codes.shape
        echo(f"{codes.folder}: {n_rows:,} rows, {d_sae:,} latents, L0 {len(codes.values) / max(n_rows, 1):.1f}")
