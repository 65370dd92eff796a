"""AbsTopK: the k pre-activations of largest magnitude, with their sign (arXiv 2510.00404)."""

from dataclasses import dataclass

from torch import Tensor

from sae_core.base import Activation
from sae_core.codes import Codes, Pattern
from sae_core.functional import topk_pattern
from sae_core.registry import register
from sae_core.variants.topk import TopKSAE


@register("abstopk")
class AbsTopKSAE(TopKSAE):
    """Keep the k largest |p| per row; a latent stands for both directions. L0 counts z != 0."""

    saelens_architecture = "abstopk"
    reads_saelens = "abstopk"

    @dataclass(frozen=True)
    class Config(TopKSAE.Config):
        """Options of abstopk."""

    config: Config

    def select(self, pre_acts: Tensor) -> Pattern:
        """The k largest magnitudes per row."""
        return topk_pattern(pre_acts.abs(), self.config.k)

    def activate(self, h: Tensor) -> Activation:
        """The selected pre-activations as they are."""
        pre_acts = self.pre_acts(h)
        pattern = self.select(pre_acts)
        return Activation(Codes(self.encode_at(h, pre_acts, pattern), pattern), pre_acts)
