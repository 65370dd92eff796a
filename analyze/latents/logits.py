"""Tokens that each latent makes more or less likely, from its decoder row and the head of the cache's model.

Shapes: F = d_sae latents, D = d_model, V vocabulary, L tokens kept at each end.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sae_granary.analyze.errors import AnalyzeError
from sae_granary.analyze.latents.stats import LatentStats
from sae_granary.analyze.source import Source
from sae_granary.models.language.unembedding import open_unembedding
from sae_granary.models.locate import SENTENCE_TRANSFORMER

FIELDS = ("logit_tokens_top", "logit_values_top", "logit_tokens_bottom", "logit_values_bottom")
N_TOKENS = 10
BLOCK_NUMBERS = 2**24  # logits held at once


@torch.no_grad()
def logit_effects(rows: Tensor, W_U: Tensor, n: int = N_TOKENS) -> dict[str, Any]:
    """The n largest and smallest entries of each row of rows (F, D) @ W_U (D, V), as fields of `LatentStats`.

    This is direct logit attribution: what a latent adds to the logits where no later block changes its direction.
    Memory: 2**24 logits.
    """
    n, size = min(n, W_U.shape[1]), max(1, BLOCK_NUMBERS // W_U.shape[1])
    ends: dict[str, list[Tensor]] = {name: [] for name in FIELDS}
    for start in range(0, len(rows), size):
        logits = rows[start : start + size] @ W_U
        for end, found in (("top", logits.topk(n, dim=1)), ("bottom", logits.topk(n, dim=1, largest=False))):
            ends[f"logit_tokens_{end}"].append(found.indices)
            ends[f"logit_values_{end}"].append(found.values)
    return {name: torch.cat(parts).cpu().numpy() for name, parts in ends.items()}


def with_logits(source: Source, stats: LatentStats, model: str | None = None) -> tuple[LatentStats, bool]:
    """Statistics with logit effects, and whether the final norm is folded into them; see `open_unembedding`.

    `model` says where the model is, if not where the cache says. Raises AnalyzeError where a latent has no effect on
    logits: whole texts, a Sentence-Transformer, a hook point of another width; ModelError for a model that is missing,
    has other weights or no head.
    """
    cache, core = source.cache, source.sae.core
    record = cache.manifest.model
    if cache.unit == "text":
        raise AnalyzeError(f"{cache.path} holds one embedding per text, which no head reads")
    if record.get("kind") == SENTENCE_TRANSFORMER:
        raise AnalyzeError(f"{record.get('id')} is a Sentence-Transformer: it has no language-model head")
    head = open_unembedding(record, lm=model, option="--model", device=str(core.W_dec.device))
    rows = core.W_dec.detach() / core.scalings()[1].scale  # in raw units
    if rows.shape[1] != len(head.W_U):
        raise AnalyzeError(
            f"decoder rows of {source.folder} have {rows.shape[1]} numbers, the head of {record.get('id')} reads "
            f"{len(head.W_U)}: only a hook point of the residual stream has logit effects"
        )
    return replace(stats, **logit_effects(rows.float(), head.W_U)), head.has_norm
