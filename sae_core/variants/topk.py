"""TopK: the k largest pre-activations of each row (Gao et al., arXiv 2406.04093)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sae_granary.sae_core.autograd import Centered
from sae_granary.sae_core.base import SAE
from sae_granary.sae_core.codes import Codes
from sae_granary.sae_core.data import Activation, SAEOutput
from sae_granary.sae_core.errors import OptionError
from sae_granary.sae_core.files import saelens, sparsify
from sae_granary.sae_core.files.disk import entry
from sae_granary.sae_core.losses import Dictionary, auxk_loss, dead_latents
from sae_granary.sae_core.options import Progress, option
from sae_granary.sae_core.pre_acts import PreActs
from sae_granary.sae_core.ranks import sharded
from sae_granary.sae_core.registry import register


@register("topk", shards_latents=True, shares_passes=True)
class TopKSAE(SAE):
    """Keep k per row, then ReLU; AuxK revives dead latents. Decoder rows have unit norm."""

    unit_decoder = True
    signed_codes: ClassVar[bool] = False  # True: no ReLU, and the k of largest magnitude are kept

    @dataclass(frozen=True)
    class Config(SAE.Config):
        """Options of topk."""

        k: int = option(32, help="Active latents per row.", gt=0, short="-k", common=True)
        auxk_coef: float = option(1 / 32, help="Weight of the AuxK loss.", ge=0)
        k_aux: int | None = option(
            None, help="Number of dead latents per row in the AuxK loss.", default_words="half of d_out", gt=0
        )
        multi_topk: bool = option(False, help="Add 1/8 of the loss at 4k, so that the SAE still works at a larger k.")
        k_start: int | None = option(
            None, help="k at the start of the run; it falls to k during k_anneal.", default_words="off", gt=0
        )
        k_anneal: float = option(0.1, help="Share of the run over which k falls from k_start.", gt=0, le=1)

        def validate(self) -> None:
            """Check that k fits d_sae."""
            if self.k_start is not None and self.k_start < self.k:
                raise OptionError(f"k_start={self.k_start}: expected k_start >= k={self.k}, from which k falls")
            for name in ("k", "k_start"):
                value = getattr(self, name)
                if value is not None and value > self.d_sae:
                    raise OptionError(f"{name}={value}: expected {name} <= d_sae={self.d_sae}; lower it or raise d_sae")

    config: Config

    def build(self) -> None:
        """Create the parameters; k is the configured one until `begin_step` sets it."""
        super().build()
        self._k_now = self.config.k

    def begin_step(self, progress: Progress) -> None:
        """Lower k from k_start."""
        start, end = self.config.k_start or self.config.k, self.config.k
        self._k_now = round(start + (end - start) * progress.ramp(self.config.k_anneal))

    @property
    def k(self) -> int:
        """Active latents per row: annealed in training, the configured k in inference."""
        return self._k_now if self.training else self.config.k

    def select(self, pre_acts: PreActs, k: int) -> Codes:
        """Select from all pre-activations (N, F)."""
        return sharded.topk(pre_acts, k, self.shards)

    def activate(self, h: Centered) -> Activation:
        """ReLU of the selected pre-activations."""
        pre_acts = self.pre_acts(h)
        return Activation(self._codes(h, pre_acts, self.k), pre_acts)

    def _codes(self, h: Centered, pre_acts: PreActs, k: int) -> Codes:
        kept = self.select(pre_acts, k)
        return Codes(torch.relu(self.encode_at(h, kept)), kept.pattern)

    def penalties(self, out: SAEOutput, progress: Progress) -> dict[str, Tensor]:
        """AuxK while latents are dead; with multi_topk, an eighth of the loss at 4k."""
        terms, scale = {}, self.loss_scale
        if self.config.auxk_coef > 0 and self.shards.any(len(dead := dead_latents(self)) > 0):
            error = (out.source.target - out.recon).detach()
            weights = Dictionary(self.W_enc, self.encoder_bias, self.W_dec)
            k_aux = self.config.k_aux or max(1, self.d_out // 2)
            auxk = auxk_loss(
                error,
                out.pre_acts,
                weights,
                dead,
                k_aux,
                signed=self.signed_codes,
                ranks=self.ranks,
                shards=self.shards,
            )
            terms["auxk"] = self.config.auxk_coef * auxk * scale.fvu_unit
        if self.config.multi_topk:
            k = min(4 * self.k, self.config.d_sae * self.shards.n)
            codes = self._codes(self.center(out.source.input), out.pre_acts, k)
            recon = self.complete(self.reconstruct(codes), out.source)
            terms["multi_topk"] = scale.reconstruction(recon, out.source.target) / 8
        return terms


saelens.express(
    TopKSAE,
    "topk",
    fields=lambda sae: {"k": sae.config.k, "rescale_acts_by_decoder_norm": False},
    options=lambda cfg: {"k": entry(cfg, "k", int)},
)
sparsify.express(TopKSAE, transcode=False)
