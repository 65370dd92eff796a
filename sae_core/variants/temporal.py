"""Temporal: high-level latents agree between neighbouring tokens (T-SAE, Bhalla et al., arXiv 2511.05541)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_granary.sae_core.base import Inputs, SAEOutput, Source
from sae_granary.sae_core.codes import Codes
from sae_granary.sae_core.options import Progress, option
from sae_granary.sae_core.registry import register
from sae_granary.sae_core.variants.matryoshka import MatryoshkaSAE


@register("temporal")
class TemporalSAE(MatryoshkaSAE):
    """A matryoshka whose high-level latents are tied to those of the neighbouring row by a contrastive loss.

    A training batch holds rows and, second, the row before each in its window. s_ij is the cosine of the high-level
    codes of row i and of the neighbour of row j; the loss is the cross-entropy of telling each row's own neighbour
    among all, in both directions, averaged. In inference one row is enough.
    """

    input_kind = "neighbours"
    saelens_architecture = "jumprelu"

    @dataclass(frozen=True)
    class Config(MatryoshkaSAE.Config):
        """Options of temporal."""

        fractions: tuple[float, ...] = option((0.2, 1.0), help="share of high-level latents, then 1")
        temporal_coef: float = option(0.1, help="weight of the contrastive loss, in units of FVU", ge=0)
        temperature: float = option(1.0, help="divides the cosines of the contrastive loss", gt=0)
        max_pairs: int = option(1024, help="rows of a batch that the contrastive loss compares", gt=1)

    config: Config

    def fit_normalization(self, sample: Inputs) -> None:
        """Fit to the rows themselves."""
        super().fit_normalization(_split(sample)[0])

    def prepare(self, x: Inputs) -> Source:
        """Normalise the rows; their neighbours are encoded by `penalties`."""
        return super().prepare(_split(x)[0])

    def forward(self, x: Inputs) -> SAEOutput:
        """Encode and decode the rows; keep the neighbours for the contrastive loss."""
        out = super().forward(x)
        previous = _split(x)[1]
        if self.training and previous is not None:
            return replace(out, extras={**out.extras, "previous": self.normalizer(previous).values})
        return out

    def penalties(self, out: SAEOutput, progress: Progress) -> dict[str, Tensor]:
        """The matryoshka's terms and the contrastive loss."""
        terms = super().penalties(out, progress)
        if "previous" in out.extras and self.config.temporal_coef > 0:
            terms["temporal"] = self.config.temporal_coef * self._contrast(out) * self.fvu_unit
        return terms

    def _contrast(self, out: SAEOutput) -> Tensor:
        n_pairs = min(self.config.max_pairs, out.codes.shape[0])
        h = self.center(out.extras["previous"][:n_pairs])
        now = self._high_level(out.codes.rows(0, n_pairs))
        before = self._high_level(self.activate(h).codes)
        similarity = F.normalize(now, dim=1) @ F.normalize(before, dim=1).t() / self.config.temperature
        own = torch.arange(n_pairs, device=similarity.device)
        return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.t(), own)) / 2

    def _high_level(self, codes: Codes) -> Tensor:
        """Dense codes of the first group, (N, F / 5): small enough to compare row with row."""
        n_high = self.config.prefixes[0]
        keep = codes.indices < n_high
        dense = codes.values.new_zeros(codes.shape[0], n_high)
        return dense.index_put((codes.pattern.row_of[keep], codes.indices[keep]), codes.values[keep])


def _split(x: Inputs) -> tuple[Tensor, Tensor | None]:
    """Rows, and the row before each if the batch has them."""
    if isinstance(x, Tensor):
        return x, None
    parts: list[Tensor] = list(x.values()) if isinstance(x, Mapping) else list(x)
    return parts[0], parts[1] if len(parts) > 1 else None
