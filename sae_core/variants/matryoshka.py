"""Matryoshka: nested prefixes of the dictionary each reconstruct the input (Bussmann et al., arXiv 2503.17547)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_granary.sae_core.base import Activation, SAEOutput
from sae_granary.sae_core.errors import OptionError
from sae_granary.sae_core.options import Progress, option
from sae_granary.sae_core.prefixes import decode_groups, prefix_errors
from sae_granary.sae_core.registry import register
from sae_granary.sae_core.variants.batchtopk import BatchTopKSAE

FRACTIONS = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)  # prefix ends: groups of 1, 2, 4, 8 and 17 thirty-seconds


@register("matryoshka")
class MatryoshkaSAE(BatchTopKSAE):
    """One batch-top-k over all latents; the loss is the sum over the prefixes' reconstruction losses, plus AuxK."""

    saelens_architecture = "jumprelu"

    @dataclass(frozen=True)
    class Config(BatchTopKSAE.Config):
        """Options of matryoshka."""

        fractions: tuple[float, ...] = option(FRACTIONS, help="ends of the nested prefixes, as shares of d_sae; last 1")
        group_sizes: tuple[int, ...] | None = option(None, help="latents per group, instead of fractions; sum d_sae")

        def validate(self) -> None:
            """Prefixes must grow and end with the whole dictionary."""
            super().validate()
            if self.group_sizes is not None:
                if any(size <= 0 for size in self.group_sizes) or sum(self.group_sizes) != self.d_sae:
                    total = sum(self.group_sizes)
                    raise OptionError(f"group_sizes={self.group_sizes} sum to {total}: expected d_sae={self.d_sae}")
            elif not self.fractions or self.fractions[-1] != 1.0 or any(not 0 < f <= 1 for f in self.fractions):
                raise OptionError(f"fractions={self.fractions}: expected shares in (0, 1] that end with 1")
            if any(b <= a for a, b in zip((0, *self.prefixes), self.prefixes, strict=False)):
                raise OptionError(f"fractions={self.fractions} of d_sae={self.d_sae}: the prefixes must grow")

        @property
        def prefixes(self) -> tuple[int, ...]:
            """Number of latents in each nested prefix."""
            if self.group_sizes is not None:
                return tuple(sum(self.group_sizes[: i + 1]) for i in range(len(self.group_sizes)))
            return tuple(max(1, round(fraction * self.d_sae)) for fraction in self.fractions)

    config: Config
    group_of: Tensor

    def build(self) -> None:
        """The parameters, and the group of each latent."""
        super().build()
        ends = torch.tensor(self.config.prefixes)
        latents = torch.arange(self.config.d_sae)
        self.register_buffer("group_of", torch.bucketize(latents, ends, right=True), persistent=False)

    def reconstruct_for_losses(self, activation: Activation, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """All prefixes for the price of one decode: each group is decoded once and the groups are summed up."""
        n_groups = len(self.config.prefixes)
        if not self.training or n_groups == 1:
            return super().reconstruct_for_losses(activation, target)
        groups = decode_groups(activation.codes, self.W_dec, self.group_of, n_groups)
        errors, whole = prefix_errors(groups, self.b_dec, target)
        return whole, {"prefix_errors": errors}

    def penalties(self, out: SAEOutput, progress: Progress) -> dict[str, Tensor]:
        """The losses of the proper prefixes (the whole dictionary's is the reconstruction loss), and AuxK."""
        terms = super().penalties(out, progress)
        errors = out.extras.get("prefix_errors")
        if errors is None:
            return terms
        return {"prefixes": self.mean_error(errors, out.source.target), **terms}
