"""`sae-analyze encode`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from sae_granary.common.errors import ConfigError

if TYPE_CHECKING:
    from sae_granary.analyze.source import Source


def encode(
    sae: SAEFolder,
    cache: CacheFolder = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder, or file of npz and parquet. (default: beside the SAE, by cache)"),
    ] = None,
    pool: Annotated[
        str | None, typer.Option(help="One row per document: max, mean or sum over the tokens that `stats` counts.")
    ] = None,
    format: Annotated[
        str, typer.Option(help="granary (memory-mapped CSR), npz (scipy.sparse.load_npz) or parquet.")
    ] = "granary",
    text: Annotated[
        list[str] | None, typer.Option("--text", "-t", help="Encode this text instead of a cache; may be repeated.")
    ] = None,
    texts: Annotated[
        str | None, typer.Option(help="Encode the texts of a file: a line each, .jsonl or .csv; - is standard input.")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="With --texts: column of the text.")] = None,
    model: Annotated[
        str | None, typer.Option(help="With texts: folder or hub id of the model. (default: the one of the cache)")
    ] = None,
    hook: Hook = "",
    device: Device = "auto",
    allow_incomplete: Incomplete = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the sparse codes of every row of a cache, or of texts. Continues an interrupted encoding of a cache."""
    with expected_errors(debug, interrupted=INTERRUPTED):
        if text and texts is not None:
            raise ConfigError("give either --text or --texts")
        from_texts = bool(text) or texts is not None
        if texts is None and text_column is not None:
            raise ConfigError("--text-column is for --texts: give a file of texts, or leave it out")
        if not from_texts and model is not None:
            raise ConfigError("--model is for texts: give --text or --texts, or leave it out")
        if from_texts and out is None:
            raise ConfigError("codes of texts need a place: give --out; `sae-analyze show --text` prints them")
        from sae_granary.analyze.encoding.outputs import check_output
        from sae_granary.analyze.source import open_source
        from sae_granary.common.process import tuned_process

        check_output(format, pool)

        with tuned_process(device):
            partly = allow_incomplete or from_texts
            source = open_source(sae, cache, hooks=names_in(hook), device=device, allow_incomplete=partly)
            if from_texts:
                assert out is not None
                line = _encode_texts(source, text, texts, text_column, model, out, format, pool, quiet=quiet)
            else:
                line = _encode_cache(source, out, format, pool, quiet=quiet)
        echo(line)


def _encode_cache(source: Source, out: Path | None, format: str, pool: str | None, *, quiet: bool) -> str:
    from sae_granary.analyze.encoding.encode import encode_cache
    from sae_granary.analyze.encoding.outputs import SUFFIXES, Output, write_cache_codes
    from sae_granary.analyze.progress import row_progress

    name = "codes" if pool is None else f"documents_{pool}"
    output = Output(source.place / f"{name}{SUFFIXES.get(format, '')}" if out is None else out, format, pool)
    plain = pool is None and format == "granary"
    if format != "granary":
        output.check_new()  # before minutes of encoding
    with row_progress("encoding", source.cache.n_rows, quiet=quiet) as tick:
        codes = encode_cache(source, output.path if plain else source.place / "codes", tick=tick)
    n_rows, d_sae = codes.shape
    if plain:
        return f"{codes.folder}: {n_rows:,} rows, {d_sae:,} latents, L0 {len(codes.values) / max(n_rows, 1):.1f}"
    with row_progress("writing", n_rows, quiet=quiet) as tick:
        n_rows = write_cache_codes(source, codes, output, tick)
    return f"{output.path}: {n_rows:,} {'rows' if pool is None else 'documents'}, {d_sae:,} latents"


def _encode_texts(
    source: Source,
    text: list[str] | None,
    texts: str | None,
    column: str | None,
    model: str | None,
    out: Path,
    format: str,
    pool: str | None,
    *,
    quiet: bool,
) -> str:
    from sae_granary.analyze.encoding.outputs import Output, write_text_codes
    from sae_granary.analyze.encoding.text_files import read_texts
    from sae_granary.analyze.encoding.text_rows import open_text_rows
    from sae_granary.analyze.encoding.texts import documents_of
    from sae_granary.analyze.progress import row_progress

    output = Output(out, format, pool)
    output.check_new()
    documents = read_texts(texts, column) if texts is not None else iter(documents_of(text or []))
    rows = open_text_rows(source.cache.manifest, source.hooks, model, str(source.sae.core.W_dec.device))
    with row_progress("encoding", None, unit="texts", quiet=quiet) as tick:
        tally = write_text_codes(source, rows, documents, output, tick)
    if n_without := tally.n_texts - tally.n_encoded:
        first = f"the first is text {tally.first_without}, counted from 0"
        echo(f"{n_without:,} of {tally.n_texts:,} texts hold no tokens and have no rows; {first}", err=True)
    return f"{out}: {tally.n_encoded:,} texts, {source.sae.config.d_sae:,} latents"
