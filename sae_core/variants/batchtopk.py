"""BatchTopK: the N*k largest pre-activations of the batch (Bussmann et al., arXiv 2412.06410)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae_granary.sae_core.codes import Codes
from sae_granary.sae_core.data import Inputs, SAEOutput
from sae_granary.sae_core.pre_acts import PreActs
from sae_granary.sae_core.registry import register
from sae_granary.sae_core.threshold import BatchThreshold
from sae_granary.sae_core.variants.topk import TopKSAE


@register("batchtopk")
class BatchTopKSAE(TopKSAE):
    """k per row on average over the micro-batch; inference keeps what exceeds one threshold, as a JumpReLU."""

    needs_calibration = True
    saelens_architecture = "jumprelu"
    reads_saelens = ""

    @dataclass(frozen=True)
    class Config(TopKSAE.Config):
        """Options of batchtopk."""

    config: Config

    def build(self) -> None:
        """The parameters, and the threshold of inference."""
        super().build()
        self.threshold = BatchThreshold()

    def select(self, pre_acts: PreActs, k: int) -> Codes:
        """The batch's largest while training; what exceeds the threshold in inference."""
        return pre_acts.batch_topk(k) if self.training else pre_acts.above(float(self.threshold.value))

    def track(self, out: SAEOutput) -> None:
        """Dead counters and the threshold's EMA."""
        super().track(out)
        values = out.codes.values.detach()
        self.threshold.update(values[values > 0])

    def monitor(self, out: SAEOutput) -> dict[str, float]:
        """The inference threshold, and how many rows the selection was made over: a micro-batch."""
        return {"threshold": float(self.threshold.value), "selection_rows": float(out.codes.shape[0])}

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Inputs]) -> None:
        """Set the threshold at which the mean L0 over the batches is k."""
        self.threshold.calibrate((self.pre_acts(self.encoder_input(x)).dense for x in batches), self.config.k)

    def latent_tensors(self) -> dict[str, Tensor]:
        """JumpReLU's tensors with a constant threshold."""
        threshold = self.threshold.value.to(self.b_enc.dtype)
        return {"b_enc": self.b_enc.detach(), "threshold": threshold.expand_as(self.b_enc).clone()}

    @torch.no_grad()
    def set_latent_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over b_enc and the constant threshold."""
        self.b_enc.copy_(tensors["b_enc"])
        self.threshold.calibrated.copy_(tensors["threshold"][0])

    def saelens_fields(self) -> dict[str, Any]:
        """Nothing beyond JumpReLU's."""
        return {}
