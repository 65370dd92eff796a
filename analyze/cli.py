"""`sae-analyze encode`, ... Heavy imports stay inside the command that needs them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae_granary.common.app import Debug, Quiet, echo, expected_errors, make_app
from sae_granary.common.errors import ConfigError

if TYPE_CHECKING:
    from sae_granary.analyze.codes import StoredCodes
    from sae_granary.analyze.source import Source
    from sae_granary.analyze.stats import LatentStats

app = make_app("sae-analyze", "Look at what an SAE learned: its codes of a cache.")

SAEFolder = Annotated[Path, typer.Argument(help="Folder of a run, or of any SAE that can be loaded.", metavar="SAE")]
CacheFolder = Annotated[Path, typer.Option("--cache", "-c", help="Folder of a cache that holds its hook points.")]

Hook = Annotated[
    str, typer.Option(help="Hook point of the cache, several with commas. (default: those it was trained on)")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Incomplete = Annotated[
    bool, typer.Option("--allow-incomplete", help="Read the shards that an unfinished harvest has committed.")
]

INTERRUPTED = "interrupted: run the same command again, it continues"


@app.command()
def encode(
    sae: SAEFolder,
    cache: CacheFolder,
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
        from sae_granary.analyze.encode import encode_cache
        from sae_granary.analyze.progress import row_progress
        from sae_granary.analyze.source import open_source
        from sae_granary.common.process import tuned_process

        with tuned_process(device):
            source = open_source(sae, cache, hooks=names_in(hook), device=device, allow_incomplete=allow_incomplete)
            with row_progress("encoding", source.cache.n_rows, quiet=quiet) as tick:
                codes = encode_cache(source, source.place / "codes" if out is None else out, tick=tick)
        n_rows, d_sae = codes.shape
        echo(f"{codes.folder}: {n_rows:,} rows, {d_sae:,} latents, L0 {len(codes.values) / max(n_rows, 1):.1f}")


@app.command()
def stats(
    sae: SAEFolder,
    cache: CacheFolder,
    hook: Hook = "",
    device: Device = "auto",
    allow_incomplete: Incomplete = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Statistics of every latent over a cache: density, activations, examples, neighbors. Encodes the cache first."""
    with expected_errors(debug, interrupted=INTERRUPTED):
        from sae_granary.analyze.show import summary_lines

        for line in summary_lines(_stats(sae, cache, hook, device, allow_incomplete, quiet)[1]):
            echo(line)


@app.command()
def show(
    sae: SAEFolder,
    cache: CacheFolder,
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
        from sae_granary.analyze.show import latent_lines, text_lines

        if latent is not None:
            source, found = _stats(sae, cache, hook, device, allow_incomplete, quiet)
            lines = latent_lines(source.cache, found, latent)
        else:
            from sae_granary.analyze.texts import encode_texts

            encoded = encode_texts(sae, text or [], cache=cache, hooks=names_in(hook), model=model, device=device)
            lines = text_lines(encoded)
        for line in lines:
            echo(line)


def _stats(
    sae: Path, cache: Path, hook: str, device: str, allow_incomplete: bool, quiet: bool
) -> tuple[Source, LatentStats]:
    """The statistics of an SAE on a cache; computed where they are not stored yet."""
    from sae_granary.analyze.encode import encode_cache
    from sae_granary.analyze.progress import row_progress
    from sae_granary.analyze.source import open_source
    from sae_granary.analyze.stats import find_stats
    from sae_granary.common.process import tuned_process

    with tuned_process(device):
        source = open_source(sae, cache, hooks=names_in(hook), device=device, allow_incomplete=allow_incomplete)

        def make_codes() -> StoredCodes:
            with row_progress("encoding", source.cache.n_rows, quiet=quiet) as tick:
                return encode_cache(source, source.place / "codes", tick=tick)

        return source, find_stats(source, make_codes)


def names_in(text: str) -> list[str]:
    """`a, b` -> ["a", "b"]."""
    return [name.strip() for name in text.split(",") if name.strip()]


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
