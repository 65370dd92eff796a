"""The cost of an SAE to the model of its cache, on the contexts of a part of the cache.

Shapes: S contexts or texts, D = width of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sae_granary.analyze.errors import DownstreamError
from sae_granary.analyze.evaluation.measure import finite
from sae_granary.analyze.evaluation.rows import choose_rows, read_settings
from sae_granary.analyze.source import Source
from sae_granary.cache.load.loader import Loader
from sae_granary.cache.load.origin import read_origin
from sae_granary.cache.load.selection import Part, Selection
from sae_granary.cache.load.whole_contexts import Contexts, read_contexts
from sae_granary.models.errors import ModelError
from sae_granary.models.language.language_model import EmbeddingModel, LanguageModel
from sae_granary.models.language.losses import downstream, notes_on, spliced_embeddings
from sae_granary.models.language.splice import open_any

BATCH_ROWS = 2**10  # in one pass through a language model: each row predicts its whole vocabulary
MAX_EMBEDDINGS = 2048  # of which all pairs are compared
Numbers = dict[str, float | None]


def evaluate_downstream(
    source: Source, part: Part, n_rows: int, models: Models, model: str | None = None
) -> tuple[Numbers, list[str]]:
    """The downstream numbers of the first contexts of a part with about n_rows rows, and notes on them.

    Through a language model ce_score, kl, ce_clean, ce_spliced, ce_ablated and n_predicted; through a
    Sentence-Transformer, and for a cache of whole texts, the embedding_* of `similarity`. Raises DownstreamError.
    """
    settings = read_settings(source.folder)
    selection, _ = choose_rows(source, part, settings)
    if source.cache.unit == "text":
        return finite(text_similarity(source, selection)), []
    if source.sae.reads.several or len(source.hooks) != 1:
        raise DownstreamError(f"{source.sae.type_name} reads several hook points, and replaces none of them")
    opened = models.open(source, model or settings.model)
    contexts = _first(source, selection, n_rows)

    def reconstruct(x: Tensor) -> Tensor:
        x_hat: Tensor = source.sae(x).x_hat
        return x_hat

    if isinstance(opened, EmbeddingModel):
        found = list(spliced_embeddings(reconstruct, opened, contexts))
        clean, spliced, ablated = (torch.cat(parts) for parts in zip(*found, strict=True))
        ablated_cosine = float(F.cosine_similarity(clean, ablated).double().mean())
        return finite({**similarity(clean, spliced), "embedding_cosine_ablated": ablated_cosine}), []
    numbers = finite(downstream(reconstruct, opened, contexts))
    return numbers, notes_on(numbers) if numbers.get("ce_ablated") is not None else []


class Models:
    """The models of caches, each loaded once for all SAEs at one hook point."""

    def __init__(self) -> None:
        self._opened: dict[tuple[str, ...], LanguageModel | EmbeddingModel] = {}

    def open(self, source: Source, place: str | None) -> LanguageModel | EmbeddingModel:
        """The model of a source's cache; `place` gives its location if it moved."""
        device = str(source.sae.core.W_dec.device)
        key = (str(source.cache.path), *source.hooks, str(place), device)
        if key not in self._opened:
            try:
                origin = read_origin(source.cache, source.hooks[0])
                self._opened[key] = open_any(*origin, lm=place, device=device, option="--model")
            except ModelError as error:
                raise DownstreamError(str(error)) from None
        return self._opened[key]


def _first(source: Source, selection: Selection, n_rows: int) -> Iterator[Contexts]:
    """The first contexts of a selection, with at least n_rows rows if available."""
    taken = 0
    for batch in read_contexts(source.cache, source.hooks[0], batch_rows=BATCH_ROWS, selection=selection, epochs=1):
        yield batch
        taken += batch.n_rows
        if taken >= n_rows:
            return


@torch.no_grad()
def text_similarity(source: Source, selection: Selection) -> Numbers:
    """`similarity` of up to 2,048 embeddings, which are rows of the cache, with their reconstructions."""
    options: dict[str, Any] = {"selection": selection, "epochs": 1, "device": source.sae.core.W_dec.device}
    with Loader(source.cache, list(source.hooks), batch_size=MAX_EMBEDDINGS, **options) as loader:
        [batch] = islice(loader, 1)
    assert isinstance(batch.x, Mapping)
    out = source.sae(batch.x)
    return similarity(out.x, out.x_hat)


def similarity(clean: Tensor, spliced: Tensor) -> Numbers:
    """What is left of embeddings (S, D).

    embedding_cosine: of each with its own, on average. embedding_rank_correlation: Spearman's, of the cosines of all
    pairs among the first 2,048, before and after; None where all cosines are equal. n_embeddings: S.
    """
    before, after = (t.double().cpu() for t in (clean, spliced))
    return {
        "embedding_cosine": float(F.cosine_similarity(before, after).mean()),
        "embedding_rank_correlation": rank_correlation(_cosines(before), _cosines(after)),
        "n_embeddings": len(before),
    }


def _cosines(x: Tensor) -> NDArray[np.float64]:
    rows = F.normalize(x[:MAX_EMBEDDINGS])
    i, j = torch.triu_indices(len(rows), len(rows), offset=1)
    cosines: NDArray[np.float64] = (rows @ rows.t())[i, j].numpy()
    return cosines


def rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Spearman's rank correlation of two arrays (P,), ties with their mean rank; None where one of them is constant."""
    ranks = [_ranks(values) for values in (a, b)]
    deviations = [values - values.mean() for values in ranks]
    norms = [float(np.sqrt(values @ values)) for values in deviations]
    if not len(a) or not all(norms):
        return None
    return float(deviations[0] @ deviations[1] / (norms[0] * norms[1]))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return ranks
