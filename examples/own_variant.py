"""Define your own type of SAE and train it: python examples/own_variant.py [CACHE]

As a file in sae_core/variants/ it is also known to the commands (`--type soft_topk`).
"""

import sys
from dataclasses import dataclass

import torch

from sae_granary import train_sae
from sae_granary.sae_core import PRE_ACTS, Centered, Codes, PreActs, option, register
from sae_granary.sae_core.variants.topk import TopKSAE

CACHE = sys.argv[1] if len(sys.argv) > 1 else "cache/demo_l3"


@register("soft_topk")
class SoftTopKSAE(TopKSAE):
    """TopK whose values shrink towards 0 by a fixed amount, so that weak latents matter less."""

    @dataclass(frozen=True)
    class Config(TopKSAE.Config):
        """Options of soft_topk."""

        shrink: float = option(0.05, help="subtracted from every kept pre-activation", ge=0, unit=PRE_ACTS)

    config: Config

    def _codes(self, h: Centered, pre_acts: PreActs, k: int) -> Codes:
        kept = self.select(pre_acts, k)
        return Codes(torch.relu(self.encode_at(h, kept) - self.config.shrink), kept.pattern)


result = train_sae(
    cache=CACHE,
    type="soft_topk",
    k=8,
    shrink=0.1,
    steps=50,
    batch_size=1024,
    name="own_variant",
    overwrite=True,
)
print(f"{result.summary['type']}: FVU {result.summary['eval']['fvu']:.4f}, L0 {result.summary['eval']['l0']:.2f}")
