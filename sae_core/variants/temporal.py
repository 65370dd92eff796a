"""Temporal: high-level latents agree between neighboring tokens (T-SAE, Bhalla et al., arXiv 2511.05541)."""

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from sae_granary.sae_core.autograd import decode
from sae_granary.sae_core.codes import Codes, Pattern
from sae_granary.sae_core.data import Reads, Rows, SAEOutput, Source
from sae_granary.sae_core.files import saelens
from sae_granary.sae_core.kernels.deferred import host_waits
from sae_granary.sae_core.options import Progress, option
from sae_granary.sae_core.registry import register
from sae_granary.sae_core.variants.matryoshka import MatryoshkaSAE

TINY = 1e-24  # the least square of a norm: a row without high-level codes is divided by its root


@register("temporal")
class TemporalSAE(MatryoshkaSAE):
    """A matryoshka with a contrastive loss between the high-level latents of neighboring rows.

    A training batch holds rows and, second, the previous row of each in its context. s_ij is the cosine between the
    high-level codes of row i and of the neighbor of row j; the loss is the cross-entropy of identifying each row's own
    neighbor among all, averaged over both directions. Inference needs one row at a time.
    """

    reads = Reads(previous=True)
    splits_batches = False  # each row is compared with the others of its batch

    @dataclass(frozen=True)
    class Config(MatryoshkaSAE.Config):
        """Options of temporal."""

        fractions: tuple[float, ...] = option((0.2, 1.0), help="Share of high-level latents, then 1.")
        temporal_coef: float = option(0.1, help="Weight of the contrastive loss, in units of FVU.", ge=0)
        temperature: float = option(1.0, help="Temperature of the contrastive loss, which divides its cosines.", gt=0)
        max_pairs: int = option(1024, help="Rows of a batch that the contrastive loss compares.", unit="rows", gt=1)

    config: Config

    def prepare(self, x: Rows) -> Source:
        """Normalize the rows; keep the raw previous rows for `penalties`."""
        source, previous = super().prepare(x), list(x.values())[1:]
        return replace(source, extras={"previous": previous[0]}) if previous and self.training else source

    def penalties(self, out: SAEOutput, progress: Progress) -> dict[str, Tensor]:
        """The matryoshka's terms and the contrastive loss."""
        terms = super().penalties(out, progress)
        if "previous" in out.extras and self.config.temporal_coef > 0:
            terms["temporal"] = self.config.temporal_coef * self._contrast(out) * self.loss_scale.fvu_unit
        return terms

    def _contrast(self, out: SAEOutput) -> Tensor:
        n_pairs = min(self.config.max_pairs, out.codes.shape[0])
        h = self.center(self.normalizer(out.extras["previous"][:n_pairs]).values)
        now = self._high_level(out.codes, n_pairs)
        before = self._high_level(self.activate(h).codes, n_pairs)
        similarity = decode(now, before.dense().t().contiguous()) / self.config.temperature
        return -(similarity.log_softmax(0) + similarity.log_softmax(1)).diagonal().mean() / 2

    def _high_level(self, codes: Codes, n_rows: int) -> Codes:
        """Codes of the first group in the first rows, (n_rows, F / 5), each row scaled to unit norm."""
        n_high = self.config.prefixes[0]
        if host_waits(codes.values):  # dense, and the others go where they are cut off: to select, the host would wait
            places = codes.pattern.row_of.clamp_max(n_rows), codes.indices.clamp_max(n_high)
            dense = codes.values.new_zeros(n_rows + 1, n_high + 1)
            dense = dense.index_put(places, codes.values, accumulate=True)[:n_rows, :n_high]
            return Codes(F.normalize(dense, dim=1), Pattern(n_rows, n_high))
        codes = codes.rows(0, n_rows)
        codes = codes.keep(codes.indices < n_high)
        row_of, values = codes.pattern.row_of, codes.values
        squares = values.new_zeros(n_rows).index_add(0, row_of, values.square())
        scaled = values / squares.clamp_min(TINY).sqrt()[row_of]
        return Codes(scaled, Pattern.of_rows(row_of, codes.indices, n_rows, n_high))


saelens.express(TemporalSAE, "jumprelu")
