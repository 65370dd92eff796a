"""Transcoder: sparse codes of one hook point that reconstruct another (Dunefsky et al., arXiv 2406.11944).

The first hook point of a batch is the input, the second the output: an MLP's input and its output, for example.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sae_granary.sae_core.base import MAX_FIT_ROWS
from sae_granary.sae_core.codes import Codes
from sae_granary.sae_core.data import Inputs, Reads, Rows, Source, as_rows, take_hooks
from sae_granary.sae_core.errors import OptionError
from sae_granary.sae_core.normalize import FIXED_MODES, Normalizer
from sae_granary.sae_core.options import option
from sae_granary.sae_core.registry import register
from sae_granary.sae_core.variants.topk import TopKSAE


@register("transcoder")
class TranscoderSAE(TopKSAE):
    """TopK codes of the input hook decode into the output hook. Each hook has its own normalisation."""

    reads = Reads(several=True)
    saelens_architecture = ""  # SAELens' transcoders are ReLU and JumpReLU
    reads_saelens = ""
    sparsify_flags = (True, False)
    subtracts_b_dec = False  # b_dec lives in the output's space

    @dataclass(frozen=True)
    class Config(TopKSAE.Config):
        """Options of transcoder."""

        normalize: str = option("dataset", help="normalisation of each hook point", choices=FIXED_MODES)
        d_out: int | None = option(None, help="width of the output hook point (default d_in)", gt=0)
        n_hooks: int = option(2, help="hook points in a batch: the input and the output", ge=2, le=2)

    config: Config

    def build_parameters(self) -> None:
        """The parameters, and the output's normaliser."""
        super().build_parameters()
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
        self.encoder_bias.zero_()

    def fit_normalization(self, x: Rows) -> None:
        """Fit each hook's normaliser."""
        first, second = take_hooks(x, 2)
        self.normalizer.fit(first[:MAX_FIT_ROWS])
        self.output_normalizer.fit(second[:MAX_FIT_ROWS])

    def prepare(self, x: Rows) -> Source:
        """The first hook is encoded, the second is the target."""
        first, second = take_hooks(x, 2)
        target = self.output_normalizer(second)
        return Source(self.normalizer(first).values, target.values, target.undo, second)

    def output_scaling(self) -> tuple[Tensor, Tensor]:
        """The output's own scale and mean."""
        return self.output_normalizer.scaling()

    def decode(self, codes: Codes, like: Inputs | None = None) -> Tensor:
        """Return the reconstruction (N, d_out) of the output hook in raw space."""
        return self.output_normalizer.undo_fixed(self.reconstruct(codes))


@register("skip_transcoder")
class SkipTranscoderSAE(TranscoderSAE):
    """A transcoder with a linear skip connection (Paulo et al., arXiv 2501.18823); W_skip starts at zero."""

    sparsify_flags = (True, True)

    @dataclass(frozen=True)
    class Config(TranscoderSAE.Config):
        """Options of skip_transcoder."""

    config: Config

    def build_parameters(self) -> None:
        """The parameters, and the skip matrix (d_in, d_out)."""
        super().build_parameters()
        self.W_skip = nn.Parameter(torch.zeros(self.config.d_in, self.d_out))

    def complete(self, recon: Tensor, source: Source) -> Tensor:
        """Add the skip path."""
        return recon + source.input @ self.W_skip

    def decode(self, codes: Codes, like: Inputs | None = None) -> Tensor:
        """Return the reconstruction in raw space; the skip path needs the rows that were encoded (`like`)."""
        if like is None:
            raise OptionError("a skip transcoder adds a path from its input: call decode(codes, like=x)")
        return self.output_normalizer.undo_fixed(
            self.complete(self.reconstruct(codes), self.prepare(as_rows(like, self.b_dec)))
        )

    def output_bias(self) -> Tensor:
        """b_dec, less what the skip path makes of the input's mean."""
        scale, mean = self.input_scaling()
        return self.b_dec - (mean * scale) @ self.W_skip

    def extra_tensors(self) -> dict[str, Tensor]:
        """The skip matrix from raw input to raw output."""
        return {"W_skip": self.W_skip.detach() * self.input_scaling()[0][:, None] / self.output_scaling()[0]}

    @torch.no_grad()
    def set_extra_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the skip matrix."""
        self.W_skip.copy_(tensors["W_skip"])
