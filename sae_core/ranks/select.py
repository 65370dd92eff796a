"""The largest pre-activations of a batch whose rows are on several ranks. Shapes: N rows of all ranks, F = d_sae."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_granary.sae_core.codes import Codes
from sae_granary.sae_core.functional import largest
from sae_granary.sae_core.pre_acts import PreActs
from sae_granary.sae_core.ranks.reduce import Alone


def batch_topk(pre_acts: PreActs, k: int, ranks: Alone) -> Codes:
    """This rank's part of the N*k largest positive pre-activations of the whole batch.

    Exactly what `PreActs.batch_topk` selects from the rows of all ranks in their order: among equal values the lowest
    (row, latent) wins. Each rank finds its own n_r*k largest; no value under the least of what any rank needs for that
    can be among the N*k largest of all, so each then sends its values above it: values, no (N, F) matrix.
    """
    own = pre_acts.batch_topk(k)
    if ranks.n == 1:
        return own
    n_rows = own.shape[0]
    is_full = own.values.numel() == n_rows * k
    # A rank with fewer positive values than its share needs all of the others' too.
    least = own.values.min().clamp_min(0.0).reshape(1) if is_full else own.values.new_zeros(1)
    bound = ranks.minimum(least)
    n_keep = k * int(ranks.sum(torch.tensor(n_rows)))
    # Those equal to the bound count: the comparison is with the next smaller number.
    candidates = pre_acts.above(float(torch.nextafter(bound, torch.zeros_like(bound))))
    parts = ranks.gather(candidates.values)
    return candidates.keep(largest(candidates, _own_share(parts, n_keep, ranks.index)))


def _own_share(parts: list[Tensor], n_keep: int, index: int) -> int:
    """How many of its candidates a rank keeps: of equal values those of lower ranks, whose rows come first, win."""
    values = torch.cat(parts)
    if values.numel() <= n_keep:
        return parts[index].numel()
    smallest = values.topk(n_keep, sorted=False).values.min()
    n_above = torch.stack([(part > smallest).sum() for part in parts])
    n_equal = torch.stack([(part == smallest).sum() for part in parts])
    left = n_keep - int(n_above.sum()) - int(n_equal[:index].sum())
    return int(n_above[index]) + min(max(left, 0), int(n_equal[index]))
