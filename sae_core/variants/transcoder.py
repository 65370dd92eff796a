"""Transcoder: sparse codes of one hook point that reconstruct another (Dunefsky et al., arXiv 2406.11944).

The first hook point of a batch is the input, the second the output: an MLP's input and its output, for example.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sae_granary.sae_core.data import Reads, Rows, Source
from sae_granary.sae_core.files import sparsify
from sae_granary.sae_core.normalize import FIXED_MODES, Normalizer
from sae_granary.sae_core.options import option
from sae_granary.sae_core.registry import register
from sae_granary.sae_core.variants.topk import TopKSAE


@register("transcoder")
class TranscoderSAE(TopKSAE):
    """TopK codes of the input hook decode into the output hook. Each hook has its own normalization."""

    reads = Reads(several=True)
    subtracts_b_dec = False  # b_dec lives in the output's space

    @dataclass(frozen=True)
    class Config(TopKSAE.Config):
        """Options of transcoder."""

        normalize: str = option("dataset", help="Normalization of each hook point.", choices=FIXED_MODES)
        d_out: int | None = option(None, help="Width of the output hook point.", default_words="d_in", gt=0)
        n_hooks: int = option(2, help="Hook points in a batch: the input and the output.", ge=2, le=2)

    config: Config

    def build(self) -> None:
        """The parameters, and the output's normalizer."""
        super().build()
        self.output_normalizer = Normalizer(self.config.normalize, self.d_out)

    @property
    def d_out(self) -> int:
        """Width of the output hook point."""
        return self.config.d_out or self.config.d_in

    @torch.no_grad()
    def reset_weights(self, generator: torch.Generator) -> None:
        """Isotropic unit rows on both sides: the two spaces share no axes, so neither is the other's transpose."""
        for matrix in (self.W_dec, self.W_enc.t()):
            rows = torch.randn(matrix.shape, generator=generator, device=generator.device)
            matrix.copy_(rows / rows.norm(dim=1, keepdim=True))
        for name, declared in self.latents.items():
            declared.reset(getattr(self, name), self.config)

    @property
    def normalizers(self) -> Sequence[Normalizer]:
        """Normalizers of the input and the output hook point."""
        return self.normalizer, self.output_normalizer

    def prepare(self, x: Rows) -> Source:
        """Use the first hook point as input and the second as target."""
        first, second = self.reads.take(x, 2)
        target = self.output_normalizer(second)
        return Source(self.normalizer(first).values, target.values, target.undo, second)


@register("skip_transcoder")
class SkipTranscoderSAE(TranscoderSAE):
    """A transcoder with a linear skip connection (Paulo et al., arXiv 2501.18823); W_skip starts at zero."""

    linear_paths = ("W_skip",)

    @dataclass(frozen=True)
    class Config(TranscoderSAE.Config):
        """Options of skip_transcoder."""

    config: Config


sparsify.express(TranscoderSAE, transcode=True)
sparsify.express(SkipTranscoderSAE, transcode=True)
