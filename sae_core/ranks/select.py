"""The largest pre-activations of a batch whose rows, or latents, are divided over ranks. Shapes: N rows, F = d_sae."""

from __future__ import annotations

import torch

from sae_granary.sae_core.codes import Codes
from sae_granary.sae_core.functional import largest
from sae_granary.sae_core.pre_acts import PreActs
from sae_granary.sae_core.ranks.reduce import ALONE, Alone


def batch_topk(pre_acts: PreActs, k: int, ranks: Alone, shards: Alone = ALONE) -> Codes:
    """This rank's part of the N*k largest positive pre-activations of the whole batch.

    Exactly what `PreActs.batch_topk` selects from the rows of all ranks in their order, or where `shards` divide the
    latents, from all latents: among equal values the lowest (row, latent) wins. Each rank finds its share of N*k
    largest ones; no value under the least of what any rank needs for that can be among the N*k largest of all, so each
    then sends its values above it: values, no (N, F) matrix.
    """
    k_own = -(-k // shards.n)
    own = pre_acts.batch_topk(k_own)
    together = ranks if shards.n == 1 else shards
    if together.n == 1:
        return own
    n_rows = own.shape[0]
    is_full = own.values.numel() == n_rows * k_own
    # A rank with fewer positive values than its share needs all of the others' too.
    least = own.values.min().clamp_min(0.0).reshape(1) if is_full else own.values.new_zeros(1)
    bound = together.minimum(least)
    n_keep = k * int(ranks.sum(torch.tensor(n_rows)))
    # Those equal to the bound count: the comparison is with the next smaller number.
    candidates = pre_acts.above(float(torch.nextafter(bound, torch.zeros_like(bound))))
    return candidates.keep(largest(candidates, _own_share(candidates, n_keep, together, by_row=shards.n > 1)))


def _own_share(candidates: Codes, n_keep: int, ranks: Alone, *, by_row: bool) -> int:
    """How many of its candidates a rank keeps, where n_keep stay of those of all.

    Of equal values those of lower ranks win, whose rows come first; `by_row`: those of lower rows, where all ranks have
    all rows.
    """
    parts, index = ranks.gather(candidates.values), ranks.index
    values = torch.cat(parts)
    if values.numel() <= n_keep:
        return parts[index].numel()
    smallest = values.topk(n_keep, sorted=False).values.min()
    n_above = torch.stack([(part > smallest).sum() for part in parts])
    n_equal = torch.stack([(part == smallest).sum() for part in parts])
    left = n_keep - int(n_above.sum())
    if by_row and left < int(n_equal.sum()):
        tied = ranks.gather(candidates.pattern.row_of[candidates.values == smallest])
        owners = torch.cat([torch.full_like(rows, rank) for rank, rows in enumerate(tied)])
        first = owners[torch.cat(tied).argsort(stable=True)[:left]]
        return int(n_above[index]) + int((first == index).sum())
    return int(n_above[index]) + min(max(left - int(n_equal[:index].sum()), 0), int(n_equal[index]))
