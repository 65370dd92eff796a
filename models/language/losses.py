"""The cost of an SAE to the language model it is spliced into: cross-entropy and KL, to report or to minimize.

CE is the mean over predicted tokens of -log p(token), KL the mean of KL(clean || spliced) over the same tokens, both in
nats; `models.language.language_model` says what is predicted where. The SAE replaces activations of kept tokens; all
others keep their clean one. It enters as a callable, rows (N, D) -> rows (N, D).

Shapes: N kept tokens, D = d_in, P predicted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_granary.models.language.language_model import Contexts, EmbeddingModel, LanguageModel, Tokens
from sae_granary.models.language.patch import Edit

Reconstruct = Callable[[Tensor], Tensor]  # (N, D) -> (N, D)
Numbers = dict[str, float | None]  # None: not defined for this model and these contexts

# Nats that zero ablation must cost before a share of them means anything: 16k tokens do not tell less from nothing.
MIN_ABLATION_COST = 1e-3


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over P of -log p(target), from logits (P, V)."""
    return F.cross_entropy(logits, targets, reduction="sum")


def kl_divergence(clean: Tensor, spliced: Tensor) -> Tensor:
    """Sum over P of sum_v p_clean (log p_clean - log p_spliced), from logits (P, V)."""
    return F.kl_div(F.log_softmax(spliced, -1), F.log_softmax(clean, -1), log_target=True, reduction="sum")


def at_kept(tokens: Tokens, rows: Reconstruct) -> Edit:
    """Edit of the activation (S, T, D) that replaces kept rows by rows(kept rows), in float32."""

    def edit(x: Tensor) -> Tensor:
        return x.index_put((tokens.keep,), rows(x[tokens.keep].float()).to(x.dtype))

    return edit


@torch.no_grad()
def downstream(
    reconstruct: Reconstruct, model: LanguageModel | EmbeddingModel, contexts: Iterable[Contexts]
) -> Numbers:
    """What an SAE costs the model: `prediction_cost`, or `embedding_cost` of a Sentence-Transformer.

    `reconstruct` is the SAE in evaluation mode, `lambda x: sae(x).x_hat`. Empty when there was nothing to measure.
    """
    if isinstance(model, EmbeddingModel):
        return embedding_cost(reconstruct, model, contexts)
    return prediction_cost(reconstruct, model, contexts)


def prediction_cost(reconstruct: Reconstruct, model: LanguageModel, contexts: Iterable[Contexts]) -> Numbers:
    """ce_score, kl, ce_clean, ce_spliced, ce_ablated and n_predicted.

    ce_score = (ce_ablated - ce_spliced) / (ce_ablated - ce_clean): 1 when nothing is lost, 0 when no more is kept than
    by zeros in the place of the activations (zero ablation). None where ablation costs the model nothing.
    """
    sums = dict.fromkeys(("ce_clean", "ce_spliced", "ce_ablated", "kl"), 0.0)
    n_predicted = 0
    for batch in contexts:
        tokens = model.tokens(batch)
        clean = model.logits(tokens)
        spliced = model.logits(tokens, at_kept(tokens, reconstruct))
        ablated = model.logits(tokens, at_kept(tokens, torch.zeros_like))
        for name, logits in (("ce_clean", clean), ("ce_spliced", spliced), ("ce_ablated", ablated)):
            sums[name] += float(cross_entropy(logits, tokens.targets))
        sums["kl"] += float(kl_divergence(clean, spliced))
        n_predicted += len(tokens.targets)
    if not n_predicted:
        return {}
    means = {name: value / n_predicted for name, value in sums.items()}
    cost = means["ce_ablated"] - means["ce_clean"]
    score = (means["ce_ablated"] - means["ce_spliced"]) / cost if not cost < MIN_ABLATION_COST else None
    return {"ce_score": score, **means, "n_predicted": n_predicted}


def notes_on(numbers: Mapping[str, float | None]) -> list[str]:
    """Remarks for readers of the numbers."""
    if "ce_score" not in numbers or numbers["ce_score"] is not None:
        return []
    return [
        f"ce_score is not defined: zero ablation costs the model nothing (CE {numbers['ce_ablated']:.4f} ablated, "
        f"{numbers['ce_clean']:.4f} clean); judge by kl and ce_spliced"
    ]


def embedding_cost(reconstruct: Reconstruct, model: EmbeddingModel, contexts: Iterable[Contexts]) -> Numbers:
    """embedding_cosine: of each context's embedding with the clean one, on average; embedding_cosine_ablated beside."""
    spliced, ablated, n_contexts = 0.0, 0.0, 0
    for found in spliced_embeddings(reconstruct, model, contexts):
        spliced += float(F.cosine_similarity(found.clean, found.spliced).sum())
        ablated += float(F.cosine_similarity(found.clean, found.ablated).sum())
        n_contexts += len(found.clean)
    if not n_contexts:
        return {}
    return {"embedding_cosine": spliced / n_contexts, "embedding_cosine_ablated": ablated / n_contexts}


class Embeddings(NamedTuple):
    """Sentence embeddings (S, D) of a batch of contexts: of the model as it is, with the SAE, with zeros."""

    clean: Tensor
    spliced: Tensor
    ablated: Tensor


@torch.no_grad()
def spliced_embeddings(
    reconstruct: Reconstruct, model: EmbeddingModel, contexts: Iterable[Contexts]
) -> Iterator[Embeddings]:
    """The embeddings of contexts, batch by batch."""
    for batch in contexts:
        tokens = model.plain(batch)
        clean = model.embeddings(tokens)
        spliced = model.embeddings(tokens, at_kept(tokens, reconstruct))
        yield Embeddings(clean, spliced, model.embeddings(tokens, at_kept(tokens, torch.zeros_like)))
