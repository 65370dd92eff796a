"""Crosscoder: one code for several hook points at once (Lindsey et al., October 2024; BatchTopK: arXiv 2504.02922)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sae_granary.sae_core.data import Reads, Rows, Source
from sae_granary.sae_core.normalize import FIXED_MODES, Affine, Normalizer
from sae_granary.sae_core.options import option
from sae_granary.sae_core.registry import register
from sae_granary.sae_core.variants.batchtopk import BatchTopKSAE


@register("crosscoder")
class CrosscoderSAE(BatchTopKSAE):
    """BatchTopK on the concatenation of the hooks' normalized rows: W_enc (L*D, F), W_dec (F, L*D)."""

    reads = Reads(several=True)

    @dataclass(frozen=True)
    class Config(BatchTopKSAE.Config):
        """Options of crosscoder."""

        normalize: str = option("dataset", help="Normalization of each hook point.", choices=FIXED_MODES)
        n_hooks: int = option(1, help="Hook points in a batch, set from the cache.", gt=0)

    config: Config

    @property
    def d_encoded(self) -> int:
        """Sum of the hook points' widths."""
        return self.config.d_in * self.config.n_hooks

    @property
    def d_out(self) -> int:
        """Sum of the hook points' widths."""
        return self.d_encoded

    def build(self) -> None:
        """Create the parameters, and one normalizer per hook point so that no layer's norm dominates."""
        super().build()
        self.normalizer = Normalizer("none", self.d_encoded)
        self.hook_normalizers = nn.ModuleList(
            Normalizer(self.config.normalize, self.config.d_in) for _ in range(self.config.n_hooks)
        )

    @property
    def normalizers(self) -> Sequence[Normalizer]:
        """One per hook point."""
        return [module for module in self.hook_normalizers if isinstance(module, Normalizer)]

    def scalings(self) -> tuple[Affine, Affine]:
        """Scales and means of all hook points, concatenated, for input and output."""
        scales, means = zip(*(normalizer.scaling() for normalizer in self.normalizers), strict=True)
        both = Affine(torch.cat(scales), torch.cat(means))
        return both, both

    def prepare(self, x: Rows) -> Source:
        """Concatenate the hooks' normalized rows."""
        normalizers = self.normalizers
        hooks = self.reads.take(x, len(normalizers))
        values = torch.cat([n(rows).values for n, rows in zip(normalizers, hooks, strict=True)], dim=1)
        return Source(values, values, self.scalings()[1].undo, torch.cat(hooks, dim=1))
