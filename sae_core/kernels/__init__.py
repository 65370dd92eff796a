"""Sparse products on a fixed pattern of active latents, and the selections that make such patterns.

`reference` implements the products with dense matrices.
"""

from sae_granary.sae_core.kernels.choice import choose, takes_triton
from sae_granary.sae_core.kernels.select import kth_largest, row_topk
from sae_granary.sae_core.kernels.sparse import bag_sum, sampled_dot, true_entries

__all__ = [
    "bag_sum",
    "choose",
    "kth_largest",
    "row_topk",
    "sampled_dot",
    "takes_triton",
    "true_entries",
]
