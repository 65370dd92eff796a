"""A frozen model with an SAE at one of its hook points: contexts in, predictions or embeddings out.

Shapes: S contexts, T tokens, D = d_in, P predicted tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sae_granary.common.hashing import derive_key, hash64
from sae_granary.common.rows import HookPoint
from sae_granary.models.language.patch import Edit, patched

MASKED_SHARE = 0.15  # of the kept tokens, as masked language models are trained
_MASK_DOMAIN = 0x6D61_736B  # "mask"

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Contexts(Protocol):
    """A batch of whole contexts, as the model saw them: arrays (S, T), padded at the end."""

    @property
    def token_id(self) -> Ints:
        """0 after the end of a context."""

    @property
    def real(self) -> Bools:
        """False after the end of a context."""

    @property
    def keep(self) -> Bools:
        """Where the SAE reads and replaces the activation."""

    @property
    def doc_id(self) -> Ints:
        """A packed context holds several documents; -1 after the end."""

    @property
    def row(self) -> Ints:
        """A number of each token that does not depend on the batch; -1 after the end."""

    def __len__(self) -> int:
        """S."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """A batch of contexts on the model's device."""

    input_ids: Tensor  # (S, T)
    attention_mask: Tensor | None  # (S, T); None when nothing is padded
    keep: Tensor  # (S, T) where the SAE replaces the activation
    predicted: Tensor  # (S, T) where the model's prediction counts
    targets: Tensor  # (P,) what it should predict there

    @property
    def n_rows(self) -> int:
        """Number of kept tokens: rows that the SAE reads."""
        return int(self.keep.sum())


@dataclass(frozen=True, eq=False)
class HookedModel:
    """A frozen model, and the hook point of an SAE in it."""

    model: nn.Module
    module: nn.Module  # that the hook point names
    point: HookPoint
    device: torch.device

    def plain(self, contexts: Contexts) -> Tokens:
        """Contexts as tensors, without prediction targets."""
        nothing = np.zeros(contexts.real.shape, np.bool_)
        return self._tokens(contexts, contexts.token_id, nothing, contexts.token_id[nothing])

    def run(self, tokens: Tokens, edit: Edit) -> Any:
        """The model's output, with the activation (S, T, D) at the hook point replaced by `edit` of it."""
        shape = (tokens.input_ids.shape[0], tokens.input_ids.shape[1])
        kwargs = {} if tokens.attention_mask is None else {"attention_mask": tokens.attention_mask}

        def here(x: Tensor) -> Tensor:  # the module may be on another GPU
            return edit(x.to(self.device)).to(x.device)

        with patched(self.module, self.point, shape, here):
            return self.model(input_ids=tokens.input_ids, **kwargs)

    def _tokens(self, contexts: Contexts, ids: Ints, predicted: Bools, targets: Ints) -> Tokens:
        def move(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(self.device)

        mask = None if contexts.real.all() else move(contexts.real).long()
        return Tokens(move(ids), mask, move(contexts.keep), move(predicted), move(targets))


@dataclass(frozen=True, eq=False)
class LanguageModel(HookedModel):
    """A model with a head that predicts tokens."""

    mask_id: int | None  # of a masked language model; None: each token predicts the next one

    def tokens(self, contexts: Contexts, mask_seed: int = 0) -> Tokens:
        """Contexts as the model takes them.

        A decoder predicts, at each kept token, the next one of the same document. An encoder predicts 15 % of the kept
        tokens, replaced by [MASK]; which ones is a function of row and seed. The SAE is applied at masked tokens too.
        """
        ids, predicted = contexts.token_id.copy(), contexts.keep.copy()
        if self.mask_id is None:
            predicted[:, -1] = False
            predicted[:, :-1] &= contexts.doc_id[:, 1:] == contexts.doc_id[:, :-1]
            return self._tokens(contexts, ids, predicted, ids[:, 1:][predicted[:, :-1]])
        limit = np.uint64(int(MASKED_SHARE * 2**64))
        predicted &= hash64(contexts.row, derive_key(_MASK_DOMAIN, mask_seed)) < limit
        targets = ids[predicted]
        ids[predicted] = self.mask_id
        return self._tokens(contexts, ids, predicted, targets)

    @property
    def vocab_size(self) -> int:
        """V."""
        config: Any = self.model.config
        return int(config.get_text_config().vocab_size)

    def logits(self, tokens: Tokens, edit: Edit = lambda x: x) -> Tensor:
        """(P, V) float32 predictions."""
        logits: Tensor = self.run(tokens, edit).logits[tokens.predicted]
        return logits.float()


@dataclass(frozen=True, eq=False)
class EmbeddingModel(HookedModel):
    """The transformer of a Sentence-Transformer, with its pooling."""

    cls_pooling: bool  # the first token's vector; else the mean over all tokens

    def embeddings(self, tokens: Tokens, edit: Edit = lambda x: x) -> Tensor:
        """(S, D) float32 sentence embeddings, not normalized."""
        hidden: Tensor = self.run(tokens, edit).last_hidden_state.float()
        if self.cls_pooling:
            return hidden[:, 0]
        if tokens.attention_mask is None:
            return hidden.mean(1)
        mask = tokens.attention_mask[:, :, None]
        return (hidden * mask).sum(1) / mask.sum(1)
