"""L0 and FVU of rows by position in the context and by kind of token.

Shapes: N rows, D = d_out, G groups, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_granary.cache.read.context import join_tokens
from sae_granary.cache.read.reader import Cache
from sae_granary.common.rows import FLAG_SPECIAL
from sae_granary.sae_core.normalize import NO_VARIANCE

POSITION_BINS = ("0", "1", *(f"{2**i}-{2 ** (i + 1) - 1}" for i in range(1, 31)))
TOKEN_CLASSES = ("special", "start of a word", "continuation of a word", "punctuation or digits")
SPECIAL, START, CONTINUATION, OTHER = range(len(TOKEN_CLASSES))
_SPACE = ("\u0120", "\u2581")  # by which byte-level BPE and SentencePiece mark the start of a word


def position_bin(position: NDArray[Any]) -> NDArray[np.int64]:
    """Bin (N,) in POSITION_BINS of positions (N,) from 0: 0, 1, 2-3, 4-7, ... (powers of two)."""
    exponents: NDArray[np.int64] = np.frexp(np.maximum(position, 0).astype(np.float64))[1].astype(np.int64)
    return exponents


class TokenClasses:
    """The class of each token, from the strings of a cache's vocabulary.

    A token without a letter is punctuation or digits. A token with letters starts a word by the conventions of
    WordPiece (no ##), SentencePiece and byte-level BPE (a leading space), or at the start of its document.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        marks_spaces = [mark for mark in _SPACE if any(word.startswith(mark) for word in vocabulary)]
        self._of_id = np.array([_class_of(word, marks_spaces) for word in vocabulary], np.int64)

    def __call__(self, token_id: NDArray[Any], flags: NDArray[Any], doc_position: NDArray[Any]) -> NDArray[np.int64]:
        """Class (N,) in TOKEN_CLASSES of rows with these columns (N,)."""
        known = (token_id >= 0) & (token_id < len(self._of_id))
        found = np.where(known, self._of_id[np.where(known, token_id, 0)], OTHER)
        found[(doc_position == 0) & (found == CONTINUATION)] = START
        found[flags & FLAG_SPECIAL != 0] = SPECIAL
        return found


def _class_of(word: str, marks_spaces: Sequence[str]) -> int:
    starts = word.startswith(tuple(marks_spaces)) if marks_spaces else not word.startswith("##")
    # With its mark in front, `join_tokens` decodes what byte-level BPE writes for other bytes than ASCII.
    text = join_tokens([marks_spaces[0] + word.removeprefix(marks_spaces[0])]) if marks_spaces else word
    if not any(character.isalpha() or character == "\ufffd" for character in text):
        return OTHER
    return START if starts else CONTINUATION


def token_classes(cache: Cache) -> TokenClasses | None:
    """The classes of a cache's tokens; None if rows are whole texts or no vocabulary was stored."""
    if cache.unit != "token" or not cache.vocabulary:
        return None
    return TokenClasses(cache.vocabulary)


class GroupedErrors:
    """Counts, active latents and squared errors of G groups, in float64. Call `update` per batch, then `table`."""

    def __init__(self, names: Sequence[str], width: int) -> None:
        self.names = names
        self._n_rows, self._n_active, self._error, self._scatter, self._squares = (
            torch.zeros(len(names), dtype=torch.float64) for _ in range(5)
        )
        self._mean = torch.zeros(len(names), width, dtype=torch.float64)

    def update(self, group: NDArray[np.int64], x: Tensor, error: Tensor, n_active: Tensor) -> None:
        """Add rows: group (N,), float64 x (N, D), squared error (N,) and active latents (N,), all on the CPU."""
        index = torch.from_numpy(group)

        def total(values: Tensor) -> Tensor:
            return values.new_zeros(len(self.names), *values.shape[1:]).index_add_(0, index, values)

        n_rows = torch.bincount(index, minlength=len(self.names)).double()
        mean = total(x) / n_rows.clamp_min(1)[:, None]
        # Chan's merge of (count, mean, sum of squared deviations): no cancellation for a large mean.
        n_after = (self._n_rows + n_rows).clamp_min(1)
        delta = mean - self._mean
        self._scatter += total((x - mean[index]).square().sum(1))
        self._scatter += delta.square().sum(1) * self._n_rows * n_rows / n_after
        self._mean += delta * (n_rows / n_after)[:, None]
        self._n_rows += n_rows
        self._error += total(error)
        self._n_active += total(n_active)
        self._squares += total(x.square().sum(1))

    def table(self) -> list[dict[str, Any]]:
        """One entry per group that has rows: group, n_rows, l0, fvu.

        fvu is sum |e|^2 / sum |x - mean|^2 over the rows of the group, with the mean of all rows: weighted by the
        denominators the groups give the FVU of all rows. None where that is zero.
        """
        overall = (self._mean * self._n_rows[:, None]).sum(0) / self._n_rows.sum().clamp_min(1)
        scatter = self._scatter + self._n_rows * (self._mean - overall).square().sum(1)
        defined = (scatter > NO_VARIANCE * self._squares) & torch.isfinite(self._error)
        return [
            {
                "group": name,
                "n_rows": int(self._n_rows[i]),
                "l0": float(self._n_active[i] / self._n_rows[i]),
                "fvu": float(self._error[i] / scatter[i]) if defined[i] else None,
            }
            for i, name in enumerate(self.names)
            if self._n_rows[i]
        ]
