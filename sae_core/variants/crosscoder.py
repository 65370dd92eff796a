"""Crosscoder: one code for several hook points at once (Lindsey et al., October 2024; BatchTopK: arXiv 2504.02922)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sae_granary.sae_core.base import MAX_FIT_ROWS
from sae_granary.sae_core.codes import Codes
from sae_granary.sae_core.data import Inputs, Reads, Rows, Source, take_hooks
from sae_granary.sae_core.normalize import FIXED_MODES, Normalizer
from sae_granary.sae_core.options import option
from sae_granary.sae_core.registry import register
from sae_granary.sae_core.variants.batchtopk import BatchTopKSAE


@register("crosscoder")
class CrosscoderSAE(BatchTopKSAE):
    """BatchTopK on the concatenation of the hooks' normalised rows: W_enc (L*D, F), W_dec (F, L*D)."""

    reads = Reads(several=True)
    saelens_architecture = ""  # SAELens has no crosscoder

    @dataclass(frozen=True)
    class Config(BatchTopKSAE.Config):
        """Options of crosscoder."""

        normalize: str = option("dataset", help="normalisation of each hook point", choices=FIXED_MODES)
        n_hooks: int = option(1, help="hook points in a batch, set from the cache", gt=0)

    config: Config

    @property
    def d_encoded(self) -> int:
        """Width of all hook points together."""
        return self.config.d_in * self.config.n_hooks

    @property
    def d_out(self) -> int:
        """Width of all hook points together."""
        return self.d_encoded

    def build_parameters(self) -> None:
        """The parameters; a normaliser per hook point, so that no layer's norm outweighs another's."""
        super().build_parameters()
        self.normalizer = Normalizer("none", self.d_encoded)
        self.hook_normalizers = nn.ModuleList(
            Normalizer(self.config.normalize, self.config.d_in) for _ in range(self.config.n_hooks)
        )

    @property
    def _normalizers(self) -> list[Normalizer]:
        return [module for module in self.hook_normalizers if isinstance(module, Normalizer)]

    def fit_normalization(self, x: Rows) -> None:
        """Fit each hook's normaliser."""
        for normalizer, rows in zip(self._normalizers, take_hooks(x, self.config.n_hooks), strict=True):
            normalizer.fit(rows[:MAX_FIT_ROWS])

    def input_scaling(self) -> tuple[Tensor, Tensor]:
        """The hooks' scales and means, one after another."""
        scales, means = zip(*(normalizer.scaling() for normalizer in self._normalizers), strict=True)
        return torch.cat(scales), torch.cat(means)

    def output_scaling(self) -> tuple[Tensor, Tensor]:
        """The same as the input's."""
        return self.input_scaling()

    def prepare(self, x: Rows) -> Source:
        """Concatenate the hooks' normalised rows."""
        hooks = take_hooks(x, self.config.n_hooks)
        values = torch.cat([n(rows).values for n, rows in zip(self._normalizers, hooks, strict=True)], dim=1)
        return Source(values, values, self._undo, torch.cat(hooks, dim=1))

    def decode(self, codes: Codes, like: Inputs | None = None) -> Tensor:
        """Return the reconstruction (N, L*D) in raw space."""
        return self._undo(self.reconstruct(codes))

    def _undo(self, recon: Tensor) -> Tensor:
        scale, mean = self.output_scaling()
        return recon / scale + mean
