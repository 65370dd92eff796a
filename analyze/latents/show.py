"""What `sae-analyze stats` and `show` print: pure functions to lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from sae_granary.analyze.latents.labels import check_latent, document_labels
from sae_granary.analyze.latents.latent_stats import quantile
from sae_granary.analyze.latents.stats import LatentStats
from sae_granary.cache.read.context import Context, join_tokens
from sae_granary.cache.read.reader import Cache
from sae_granary.common.rows import FLAG_SPECIAL

if TYPE_CHECKING:
    from sae_granary.analyze.encoding.texts import EncodedTexts

LABEL_CHARACTERS = 40  # of a token, or of a text that is one row
TEXT_CHARACTERS = 160  # shown of a row that is a whole text


def summary_lines(stats: LatentStats) -> list[str]:
    """Statistics of all latents together."""
    density, fired = stats.density, stats.fired > 0
    low, middle, high = np.quantile(density[fired], [0.05, 0.5, 0.95]) if fired.any() else (0.0, 0.0, 0.0)
    return [
        f"rows         {stats.n_rows:,} (special tokens left out)",
        f"L0           {stats.fired.sum() / max(stats.n_rows, 1):.1f}",
        f"never fired  {int((~fired).sum()):,} of {len(fired):,} latents",
        f"density      5% {low:.2e}, median {middle:.2e}, 95% {high:.2e} (of latents that fire)",
        "densest      " + ", ".join(f"{i} ({density[i]:.1%})" for i in np.argsort(-density, kind="stable")[:5]),
    ]


def latent_lines(cache: Cache, stats: LatentStats, latent: int) -> Iterator[str]:
    """Statistics, neighbors and the strongest examples of a latent, the active token in [[brackets]].

    Raises ConfigError for a latent that there is not.
    """
    check_latent(latent, len(stats.fired))
    one = stats.histogram[latent : latent + 1]
    fired = int(stats.fired[latent])
    yield f"latent {latent}: active on {fired:,} of {stats.n_rows:,} rows ({stats.density[latent]:.3%})"
    if not fired:
        return
    median, high = (float(quantile(one, q)[0]) for q in (0.5, 0.95))
    mean, largest = stats.mean[latent], stats.largest[latent]
    yield f"activation: mean {mean:.3g}, median {median:.3g}, 95% {high:.3g}, max {largest:.3g}"
    pairs = zip(stats.neighbors[latent].tolist(), stats.cosines[latent].tolist(), strict=True)
    yield "nearest decoder rows: " + ", ".join(f"{other} ({cosine:.2f})" for other, cosine in pairs)
    for row, value in zip(stats.example_rows[latent].tolist(), stats.example_values[latent].tolist(), strict=True):
        if row >= 0:
            context = cache.context(row)
            yield f"{value:8.3f}  {marked(context)}  ({', '.join(document_labels(context.document))})"


def marked(context: Context) -> str:
    """The text around a row in one line, its token in [[brackets]]; the beginning of the text for a pooled row."""
    if context.index < 0:
        return " ".join(context.text.split())[:TEXT_CHARACTERS]
    before, after = context.tokens[: context.index], context.tokens[context.index + 1 :]
    token = join_tokens([context.tokens[context.index]])
    return " ".join(f"{join_tokens(before)} [[{token}]] {join_tokens(after)}".split())


def text_lines(found: EncodedTexts, n_latents: int = 5) -> Iterator[str]:
    """The strongest latents of each row of encoded texts, a blank line between texts; special tokens left out."""
    codes = found.codes
    indptr, indices = codes.indptr.cpu().numpy(), codes.indices.cpu().numpy()
    values = codes.values.reshape(-1).float().cpu().numpy()
    shown = np.flatnonzero(found.flags & FLAG_SPECIAL == 0)
    labels = [" ".join(found.tokens[row].split())[:LABEL_CHARACTERS] for row in shown]
    width = max(map(len, labels), default=0)
    for place, row in enumerate(shown):
        if place and found.text[row] != found.text[shown[place - 1]]:
            yield ""
        part = slice(int(indptr[row]), int(indptr[row + 1]))
        order = np.argsort(-np.abs(values[part]), kind="stable")[:n_latents]
        pairs = [f"{indices[part][i]} ({values[part][i]:.2f})" for i in order if values[part][i] != 0]
        yield f"{labels[place]:<{width}}  {', '.join(pairs)}"
