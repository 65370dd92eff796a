"""What an SAE costs the language model that it stands in: cross-entropy and KL divergence, to report or to minimise.

CE is the mean over predicted tokens of -log p(token), KL the mean of KL(clean || spliced) over the same tokens, both in
nats; what is predicted where says `models.language.language_model`. The SAE's output stands at the tokens that the run
trains on (its filters and its part of the documents); all others keep their clean activation.

Shapes: N kept tokens, D = d_in, P predicted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_granary.cache.load.whole_contexts import Contexts
from sae_granary.models.language.language_model import EmbeddingModel, LanguageModel, Tokens
from sae_granary.models.language.patch import Edit
from sae_granary.sae_core import SAE, Progress, SAEOutput
from sae_granary.train.step_input import Terms

Rows = Callable[[Tensor], Tensor]  # (N, D) -> (N, D)
Numbers = dict[str, float | None]  # None: not defined for this model and these windows

# Nats that zero ablation must cost before a share of them means anything: 16k tokens do not tell less from nothing.
MIN_ABLATION_COST = 1e-3


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over P of -log p(target), from logits (P, V)."""
    return F.cross_entropy(logits, targets, reduction="sum")


def kl_divergence(clean: Tensor, spliced: Tensor) -> Tensor:
    """Sum over P of sum_v p_clean (log p_clean - log p_spliced), from logits (P, V)."""
    return F.kl_div(F.log_softmax(spliced, -1), F.log_softmax(clean, -1), log_target=True, reduction="sum")


def at_kept(tokens: Tokens, rows: Rows) -> Edit:
    """An edit of the activation (S, T, D) that puts rows(kept rows) in their place; the rows are float32."""

    def edit(x: Tensor) -> Tensor:
        return x.index_put((tokens.keep,), rows(x[tokens.keep].float()).to(x.dtype))

    return edit


@torch.no_grad()
def downstream(sae: SAE, model: LanguageModel | EmbeddingModel, windows: Iterable[Contexts]) -> Numbers:
    """What an SAE in inference costs the model: `prediction_cost`, or `embedding_cost` of a Sentence-Transformer.

    The SAE is left in the mode that it was in. Empty when there was nothing to measure.
    """
    training = sae.training
    sae.eval()
    try:
        if isinstance(model, EmbeddingModel):
            return embedding_cost(lambda rows: sae(rows).x_hat, model, windows)
        return prediction_cost(lambda rows: sae(rows).x_hat, model, windows)
    finally:
        sae.train(training)


def prediction_cost(reconstruct: Rows, model: LanguageModel, windows: Iterable[Contexts]) -> Numbers:
    """ce_score, kl, ce_clean, ce_spliced, ce_ablated and n_predicted.

    ce_score = (ce_ablated - ce_spliced) / (ce_ablated - ce_clean): 1 when nothing is lost, 0 when no more is kept than
    by zeros in the place of the activations (zero ablation). None where ablation costs the model nothing.
    """
    sums = dict.fromkeys(("ce_clean", "ce_spliced", "ce_ablated", "kl"), 0.0)
    n_predicted = 0
    for batch in windows:
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
    """What a reader of the numbers should know, in words."""
    if "ce_score" not in numbers or numbers["ce_score"] is not None:
        return []
    return [
        f"ce_score is not defined: zero ablation costs the model nothing (CE {numbers['ce_ablated']:.4f} ablated, "
        f"{numbers['ce_clean']:.4f} clean); judge by kl and ce_spliced"
    ]


def embedding_cost(reconstruct: Rows, model: EmbeddingModel, windows: Iterable[Contexts]) -> Numbers:
    """embedding_cosine: of each window's embedding with the clean one, on average; embedding_cosine_ablated beside."""
    spliced, ablated, n_windows = 0.0, 0.0, 0
    for batch in windows:
        tokens = model.plain(batch)
        clean = model.embeddings(tokens)
        spliced += float(F.cosine_similarity(clean, model.embeddings(tokens, at_kept(tokens, reconstruct))).sum())
        ablated += float(F.cosine_similarity(clean, model.embeddings(tokens, at_kept(tokens, torch.zeros_like))).sum())
        n_windows += len(batch)
    if not n_windows:
        return {}
    return {"embedding_cosine": spliced / n_windows, "embedding_cosine_ablated": ablated / n_windows}


@dataclass(frozen=True, eq=False)
class SplicedInput:
    """Windows for a training step through the language model; gradients reach the SAE only.

    The loss, kl or ce, stands where the SAE's reconstruction loss would; penalties stay. `balanced` keeps both, as
    Karvonen's KL finetuning does (arXiv 2503.17272): (recon + kl * sg(recon / kl)) / 2. Their magnitudes are equal at
    every step and the sum is that of the reconstruction loss alone, so that penalties keep their weight.
    """

    model: LanguageModel
    windows: Contexts
    kind: str
    balanced: bool = False

    @property
    def n_rows(self) -> int:
        """Kept tokens."""
        return self.windows.n_rows

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.model.device

    def split(self, n_parts: int) -> Iterator[SplicedInput]:
        """At most n parts of about equally many windows."""
        yield from (replace(self, windows=part) for part in self.windows.split(n_parts))

    def is_finite(self) -> bool:
        """Token ids are; what the model makes of them shows in the loss."""
        return True

    def terms(self, sae: SAE, progress: Progress) -> Terms:
        """Run the model with the SAE in it. Each pass over the cache masks other tokens of an encoder's text."""
        tokens = self.model.tokens(self.windows, mask_seed=self.windows.state.epoch)
        outputs: list[SAEOutput] = []

        def rows(x: Tensor) -> Tensor:
            outputs.append(sae(x))
            return outputs[0].x_hat

        clean = None
        if self.kind == "kl":
            with torch.no_grad():
                clean = self.model.logits(tokens)
        spliced = self.model.logits(tokens, at_kept(tokens, rows))
        total = cross_entropy(spliced, tokens.targets) if clean is None else kl_divergence(clean, spliced)
        loss = total / max(len(tokens.targets), 1)
        terms = sae.losses(outputs[0], progress)
        recon = terms.pop(sae.reconstruction_name)
        first = {self.kind: loss}
        if self.balanced:
            ratio = (recon / loss.clamp_min(1e-12)).detach()
            first = {sae.reconstruction_name: recon / 2, self.kind: loss * ratio / 2}
        return Terms(outputs[0], {**first, **terms}, {self.kind: float(loss.detach())})
