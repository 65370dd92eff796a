"""BatchTopK: the N*k largest pre-activations of the batch (Bussmann et al., arXiv 2412.06410)."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sae_granary.sae_core.codes import Codes
from sae_granary.sae_core.data import Inputs, SAEOutput
from sae_granary.sae_core.files import saelens
from sae_granary.sae_core.latents import BatchThreshold, PerLatent, SharedThreshold
from sae_granary.sae_core.pre_acts import PreActs
from sae_granary.sae_core.ranks.select import batch_topk
from sae_granary.sae_core.registry import register
from sae_granary.sae_core.variants.topk import TopKSAE


@register("batchtopk", shards_latents=True)
class BatchTopKSAE(TopKSAE):
    """k per row on average over the micro-batch; inference keeps what exceeds one threshold, as a JumpReLU.

    Where ranks share the batches, the micro-batch is that of all ranks: `ranks.select`.
    """

    selects_in_batch = True
    latents: ClassVar[Mapping[str, PerLatent]] = {**TopKSAE.latents, "threshold": SharedThreshold()}

    @dataclass(frozen=True)
    class Config(TopKSAE.Config):
        """Options of batchtopk."""

    config: Config
    threshold: BatchThreshold

    def select(self, pre_acts: PreActs, k: int) -> Codes:
        """The batch's largest in training; in inference, all that exceed the threshold."""
        if self.training:
            return batch_topk(pre_acts, k, self.ranks, self.shards)
        return pre_acts.above(float(self.threshold.value))

    def track(self, out: SAEOutput) -> None:
        """Update dead counters and the threshold's EMA."""
        super().track(out)
        self.threshold.update(self.shards.least(self.ranks.least(out.codes.values.detach())))

    def monitor(self, out: SAEOutput) -> dict[str, Tensor | float]:
        """The inference threshold, and the number of rows of the last selection (a micro-batch)."""
        n_rows = self.ranks.sum(torch.tensor(float(out.codes.shape[0])))
        return {"threshold": self.threshold.value, "selection_rows": n_rows}

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Inputs]) -> None:
        """Set the threshold so that the mean L0 over the batches is k."""

        def entries(bound: float) -> Iterator[tuple[int, Tensor]]:
            for x in batches:
                yield from self.pre_acts(self.encoder_input(x)).at_least_above(bound)

        self.threshold.calibrate(entries, self.config.k, self.shards, again=not isinstance(batches, Iterator))


saelens.express(BatchTopKSAE, "jumprelu")
