"""`sae-analyze encode`, ... Heavy imports stay inside the command that needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sae_granary.common.app import Debug, Quiet, echo, expected_errors, make_app

app = make_app("sae-analyze", "Look at what an SAE learned: its codes of a cache.")

SAEFolder = Annotated[Path, typer.Argument(help="Folder of a run, or of any SAE that can be loaded.", metavar="SAE")]
CacheFolder = Annotated[Path, typer.Option("--cache", "-c", help="Folder of a cache that holds its hook points.")]


@app.command()
def encode(
    sae: SAEFolder,
    cache: CacheFolder,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="(default: SAE/analysis/<key of the cache>/codes)")
    ] = None,
    hook: Annotated[
        str, typer.Option(help="Hook point of the cache, several with commas. (default: those it was trained on)")
    ] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="Read the shards that an unfinished harvest has committed.")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the sparse codes of every row of a cache. The same command continues after an interruption."""
    with expected_errors(debug, interrupted="interrupted: run the same command again, it continues"):
        from sae_granary.analyze.encode import encode_cache
        from sae_granary.analyze.progress import row_progress
        from sae_granary.analyze.source import open_source
        from sae_granary.common.process import tuned_process

        hooks = [name.strip() for name in hook.split(",") if name.strip()]
        with tuned_process(device):
            source = open_source(sae, cache, hooks=hooks, device=device, allow_incomplete=allow_incomplete)
            with row_progress("encoding", source.cache.n_rows, quiet=quiet) as tick:
                codes = encode_cache(source, source.place / "codes" if out is None else out, tick=tick)
        n_rows, d_sae = codes.shape
        echo(f"{codes.folder}: {n_rows:,} rows, {d_sae:,} latents, L0 {len(codes.values) / max(n_rows, 1):.1f}")


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
