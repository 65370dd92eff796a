"""A frozen language model with an SAE at one of its hook points: windows in, predictions out.

Shapes: S windows, T tokens, D = d_in, P predicted tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cache import shuffle
from cache.rows import HookPoint
from cache.windows import Windows
from train.patch import Edit, patched

MASKED_SHARE = 0.15  # of the kept tokens, as masked language models are trained
_MASK_DOMAIN = 0x6D61_736B  # "mask"


@dataclass(frozen=True, eq=False)
class Tokens:
    """A batch of windows on the model's device."""

    input_ids: Tensor  # (S, T)
    attention_mask: Tensor | None  # (S, T); None when nothing is padded
    keep: Tensor  # (S, T) where the SAE stands in the model
    predicted: Tensor  # (S, T) where the model's prediction counts
    targets: Tensor  # (P,) what it should predict there

    @property
    def n_rows(self) -> int:
        """Kept tokens: rows that the SAE sees."""
        return int(self.keep.sum())


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A frozen model with its head, and the hook point of an SAE in it."""

    model: nn.Module
    module: nn.Module  # that the hook point names
    point: HookPoint
    device: torch.device
    mask_id: int | None  # of a masked language model; None: each token predicts the next one

    def tokens(self, windows: Windows, mask_seed: int = 0) -> Tokens:
        """Windows as the model takes them.

        A decoder predicts, at each kept token, the next one of the same document. An encoder predicts 15 % of the kept
        tokens, replaced by [MASK]; which ones is a function of row and seed. The SAE stands at masked tokens too.
        """
        ids, keep = windows.token_id.copy(), windows.keep
        if self.mask_id is None:
            predicted = keep.copy()
            predicted[:, -1] = False
            predicted[:, :-1] &= windows.doc_id[:, 1:] == windows.doc_id[:, :-1]
            targets = ids[:, 1:][predicted[:, :-1]]
        else:
            limit = np.uint64(int(MASKED_SHARE * 2**64))
            predicted = keep & (shuffle.hash64(windows.row, shuffle.derive_key(_MASK_DOMAIN, mask_seed)) < limit)
            targets = ids[predicted]
            ids[predicted] = self.mask_id
        mask = None if windows.real.all() else self._move(windows.real).long()
        return Tokens(self._move(ids), mask, self._move(keep), self._move(predicted), self._move(targets))

    def logits(self, tokens: Tokens, edit: Edit = lambda x: x) -> Tensor:
        """(P, V) float32 predictions with the hook point's activation (S, T, D) replaced by what `edit` makes of it."""
        shape = (tokens.input_ids.shape[0], tokens.input_ids.shape[1])
        kwargs = {} if tokens.attention_mask is None else {"attention_mask": tokens.attention_mask}
        with patched(self.module, self.point, shape, edit):
            out = self.model(input_ids=tokens.input_ids, **kwargs)
        logits: Tensor = out.logits[tokens.predicted]
        return logits.float()

    def _move(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self.device)
