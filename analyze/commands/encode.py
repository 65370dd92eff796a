"""`sae-analyze encode`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from sae_granary.analyze.commands.options import takes_options
from sae_granary.analyze.commands.shared import INTERRUPTED, SAEFolder, source_of, working
from sae_granary.analyze.settings import Encode
from sae_granary.common.app import Debug, Quiet, echo, expected_errors
from sae_granary.common.errors import ConfigError

if TYPE_CHECKING:
    from sae_granary.analyze.source import Source


@takes_options(Encode)
def encode(read_options: Callable[[], Encode], sae: SAEFolder, quiet: Quiet = False, debug: Debug = False) -> None:
    """Write the sparse codes of every row of a cache, or of texts. Continues an interrupted encoding of a cache."""
    with expected_errors(debug, interrupted=INTERRUPTED):
        options = read_options()
        from_texts = _reads_texts(options)

        with working(options):
            source = source_of(sae, replace(options, allow_incomplete=options.allow_incomplete or from_texts))
            line = (_encode_texts if from_texts else _encode_cache)(source, options, quiet=quiet)
        echo(line)


def _reads_texts(options: Encode) -> bool:
    """Whether texts are encoded, not a cache. Raises ConfigError for options that do not go together."""
    if options.text and options.texts is not None:
        raise ConfigError("give either --text or --texts")
    from_texts = bool(options.text) or options.texts is not None
    if options.texts is None and options.text_column is not None:
        raise ConfigError("--text-column is for --texts: give a file of texts, or leave it out")
    if not from_texts and options.model is not None:
        raise ConfigError("--model is for texts: give --text or --texts, or leave it out")
    if from_texts and options.out is None:
        raise ConfigError("codes of texts need a place: give --out; `sae-analyze show --text` prints them")
    return from_texts


def _encode_cache(source: Source, options: Encode, *, quiet: bool) -> str:
    from sae_granary.analyze.encoding.encode import encode_cache
    from sae_granary.analyze.encoding.outputs import SUFFIXES, Output, write_cache_codes
    from sae_granary.analyze.progress import row_progress

    out, format, pool = options.out, options.format, options.pool
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


def _encode_texts(source: Source, options: Encode, *, quiet: bool) -> str:
    from sae_granary.analyze.encoding.outputs import Output, write_text_codes
    from sae_granary.analyze.encoding.text_files import read_texts
    from sae_granary.analyze.encoding.text_rows import open_text_rows
    from sae_granary.analyze.encoding.texts import documents_of
    from sae_granary.analyze.progress import row_progress

    assert options.out is not None
    output = Output(options.out, options.format, options.pool)
    output.check_new()
    if options.texts is not None:
        documents = read_texts(options.texts, options.text_column)
    else:
        documents = iter(documents_of(options.text))
    rows = open_text_rows(source.cache, source.hooks, options.model, str(source.sae.core.W_dec.device))
    with row_progress("encoding", None, unit="texts", quiet=quiet) as tick:
        tally = write_text_codes(source, rows, documents, output, tick)
    if n_without := tally.n_texts - tally.n_encoded:
        first = f"the first is text {tally.first_without}, counted from 0"
        echo(f"{n_without:,} of {tally.n_texts:,} texts hold no tokens and have no rows; {first}", err=True)
    return f"{options.out}: {tally.n_encoded:,} texts, {source.sae.config.d_sae:,} latents"
