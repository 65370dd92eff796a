"""AbsTopK: the k pre-activations of largest magnitude, with their sign (arXiv 2510.00404)."""

from dataclasses import dataclass

from sae_granary.sae_core.autograd import Centered
from sae_granary.sae_core.codes import Codes
from sae_granary.sae_core.files import saelens, sparsify
from sae_granary.sae_core.files.disk import entry
from sae_granary.sae_core.pre_acts import PreActs
from sae_granary.sae_core.registry import register
from sae_granary.sae_core.variants.topk import TopKSAE


@register("abstopk")
class AbsTopKSAE(TopKSAE):
    """Keep the k largest |p| per row; a latent represents both directions. L0 counts z != 0."""

    signed_codes = True

    @dataclass(frozen=True)
    class Config(TopKSAE.Config):
        """Options of abstopk."""

    config: Config

    def select(self, pre_acts: PreActs, k: int) -> Codes:
        """The k largest magnitudes per row."""
        return pre_acts.topk(k, by_magnitude=True)

    def _codes(self, h: Centered, pre_acts: PreActs, k: int) -> Codes:
        kept = self.select(pre_acts, k)
        return Codes(self.encode_at(h, kept), kept.pattern)


saelens.express(
    AbsTopKSAE,
    "abstopk",
    fields=lambda sae: {"k": sae.config.k, "rescale_acts_by_decoder_norm": False},
    options=lambda cfg: {"k": entry(cfg, "k", int)},
)
sparsify.express(AbsTopKSAE, transcode=False, signed=True)
