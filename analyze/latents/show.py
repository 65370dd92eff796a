"""Output of `sae-analyze stats` and `show`: pure functions to lines, which `commands.shared.echo_line` prints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae_granary.analyze.counted_rows import left_out
from sae_granary.analyze.latents.labels import check_latent, document_labels
from sae_granary.analyze.latents.latent_stats import quantile
from sae_granary.analyze.latents.quantile_examples import N_INTERVALS
from sae_granary.analyze.latents.stats import N_EXAMPLES, LatentStats
from sae_granary.analyze.token_texts import displayed
from sae_granary.cache.read.context import Context, split_tokens
from sae_granary.cache.read.reader import Cache
from sae_granary.common.errors import ConfigError
from sae_granary.common.rows import FLAG_SPECIAL

if TYPE_CHECKING:
    from sae_granary.analyze.encoding.texts import EncodedTexts

LABEL_CHARACTERS = 40  # of a token, or of a text that is one row
TEXT_CHARACTERS = 160  # shown of a row that is a whole text
_SPACES = re.compile(r"\s+")
WHOLE = "(text)"  # the label of the latents of a whole text


class Marked(NamedTuple):
    """A line of text with one marked token: colored on a terminal, in [[brackets]] elsewhere."""

    before: str
    token: str
    after: str

    def __str__(self) -> str:
        return f"{self.before}[[{self.token}]]{self.after}"


def summary_lines(cache: Cache, stats: LatentStats) -> list[str]:
    """Statistics over all latents."""
    density, fired = stats.density, stats.fired > 0
    low, middle, high = np.quantile(density[fired], [0.05, 0.5, 0.95]) if fired.any() else (0.0, 0.0, 0.0)
    return [
        f"rows         {stats.n_rows:,} ({left_out(cache)})",
        f"L0           {stats.fired.sum() / max(stats.n_rows, 1):.1f}",
        f"never fired  {int((~fired).sum()):,} of {len(fired):,} latents",
        f"density      5% {low:.2e}, median {middle:.2e}, 95% {high:.2e} (of latents that fire)",
        "densest      " + ", ".join(f"{i} ({density[i]:.1%})" for i in np.argsort(-density, kind="stable")[:5]),
    ]


def latent_lines(cache: Cache, stats: LatentStats, latent: int, top: int = N_EXAMPLES) -> Iterator[str | Marked]:
    """Statistics, neighbors, logit effects where stored, and examples of a latent: the `top` strongest, then weaker.

    Raises ConfigError for a latent that there is not, and for more examples than are stored.
    """
    d_sae, n_stored = stats.example_rows.shape
    check_latent(latent, d_sae)
    if not 1 <= top <= n_stored:
        raise ConfigError(f"--top is {top}, expected 1 to {n_stored}: so many examples of a latent are stored")
    fired = int(stats.fired[latent])
    yield f"latent {latent}: active on {fired:,} of {stats.n_rows:,} rows ({stats.density[latent]:.3%})"
    if not fired:
        return
    one = stats.histogram[latent : latent + 1]
    median, high = (float(quantile(one, q)[0]) for q in (0.5, 0.95))
    mean, largest = stats.mean[latent], stats.largest[latent]
    yield f"activation: mean {mean:.3g}, median {median:.3g}, 95% {high:.3g}, max {largest:.3g}"
    yield from _others(cache, stats, latent)
    yield "strongest:"
    for row, value in zip(stats.example_rows[latent, :top].tolist(), stats.example_values[latent], strict=False):
        if row >= 0:
            yield example_line(cache, row, f"{value:8.3f}  ")
    yield f"by share of the maximum, {largest:.3g}:"
    pairs = zip(stats.quantile_rows[latent].tolist(), stats.quantile_values[latent].tolist(), strict=True)
    for i, (row, value) in enumerate(pairs):
        share = f"{100 * i // N_INTERVALS}-{100 * (i + 1) // N_INTERVALS}%"
        yield example_line(cache, row, f"{share:>8}  {value:.3f}  ") if row >= 0 else f"{share:>8}  -"


def _others(cache: Cache, stats: LatentStats, latent: int) -> Iterator[str]:
    """Latents and tokens related to a latent."""
    pairs = zip(stats.neighbors[latent].tolist(), stats.cosines[latent].tolist(), strict=True)
    yield "nearest decoder rows: " + ", ".join(f"{other} ({cosine:.2f})" for other, cosine in pairs)
    pairs = zip(stats.coactive[latent].tolist(), stats.coactive_score[latent].tolist(), strict=True)
    together = ", ".join(f"{other} ({score:.2f})" for other, score in pairs if other >= 0) or "none"
    yield f"active on the same rows: {together} (Jaccard index over {stats.coactive_rows:,} rows)"
    words = cache.vocabulary or []
    for label, tokens, values in (
        ("raises", stats.logit_tokens_top, stats.logit_values_top),
        ("lowers", stats.logit_tokens_bottom, stats.logit_values_bottom),
    ):
        if tokens is not None and values is not None:
            names = displayed([words[i] if i < len(words) else str(i) for i in tokens[latent].tolist()], words)
            pairs = zip(map(_label, names), values[latent].tolist(), strict=True)
            yield f"{label} logits of: " + ", ".join(f"{name} ({value:.2f})" for name, value in pairs)


def example_line(cache: Cache, row: int, label: str) -> str | Marked:
    """The text around a row behind a label, with the document's source and the columns of it that were kept."""
    context = cache.context(row)
    line, told = marked(context), f"  ({_one_line(', '.join(document_labels(context.document)))})"
    if isinstance(line, Marked):
        return Marked(label + line.before, line.token, line.after + told)
    return label + line + told


def _one_line(value: object) -> str:
    return " ".join(str(value).split())


def _label(token: str) -> str:
    """A token in one line without surrounding spaces; a token of spaces only, escaped."""
    return _one_line(token) or repr(token)[1:-1]


def marked(context: Context) -> str | Marked:
    """The text around a row in one line, its token marked; the beginning of the text for a pooled row."""
    if context.index < 0:
        return _one_line(context.text)[:TEXT_CHARACTERS]
    before, token, after = split_tokens(context.tokens, context.index)
    bare = _one_line(token)
    if bare:  # its spaces belong to the text around it
        before += token[: len(token) - len(token.lstrip())]
        after = token[len(token.rstrip()) :] + after
    return Marked(_SPACES.sub(" ", before).lstrip(), bare or repr(token)[1:-1], _SPACES.sub(" ", after).rstrip())


def text_lines(found: EncodedTexts, n_latents: int = 5) -> Iterator[str]:
    """The strongest latents of each row of encoded texts, then those of each text, whatever the token.

    Special tokens are left out; a blank line is between texts. Raises ConfigError for no latents.
    """
    if n_latents < 1:
        raise ConfigError(f"--top is {n_latents}, expected 1 or more")
    codes = found.codes
    indptr, indices = codes.indptr.cpu().numpy(), codes.indices.cpu().numpy()
    values = codes.values.reshape(-1).float().cpu().numpy()
    shown = np.flatnonzero(found.flags & FLAG_SPECIAL == 0)
    pieces = any(token.startswith("##") for token in found.tokens)  # WordPiece marks continued words
    names = found.tokens if pieces else displayed(found.tokens, found.tokens)
    labels = {row: _label(names[row])[:LABEL_CHARACTERS] for row in shown.tolist()}
    width = max(map(len, [*labels.values(), WHOLE]), default=0)
    for number, text in enumerate(np.unique(found.text[shown])):
        if number:
            yield ""
        rows = shown[found.text[shown] == text].tolist()
        best: dict[int, tuple[float, str]] = {}  # latent -> its strongest activation, and the token of it
        for row in rows:
            part = slice(int(indptr[row]), int(indptr[row + 1]))
            pairs = list(zip(indices[part].tolist(), values[part].tolist(), strict=True))
            pairs = sorted((pair for pair in pairs if pair[1]), key=lambda pair: -abs(pair[1]))
            yield f"{labels[row]:<{width}}  " + ", ".join(f"{i} ({value:.2f})" for i, value in pairs[:n_latents])
            for i, value in pairs:
                best[i] = max(best.get(i, (0.0, "")), (value, labels[row]), key=lambda pair: abs(pair[0]))
        if len(rows) > 1:
            top = sorted(best.items(), key=lambda item: -abs(item[1][0]))[:n_latents]
            yield f"{WHOLE:<{width}}  " + ", ".join(f"{i} ({value:.2f} at {token})" for i, (value, token) in top)
