"""TopK: the k largest pre-activations of each row (Gao et al., arXiv 2406.04093)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae_core.base import SAE, Activation, SAEOutput
from sae_core.codes import Codes, Pattern
from sae_core.errors import OptionError
from sae_core.functional import topk_pattern
from sae_core.options import Progress, option
from sae_core.registry import register


@register("topk")
class TopKSAE(SAE):
    """Keep k per row, then ReLU; AuxK revives dead latents. Decoder rows have unit norm."""

    unit_decoder = True
    saelens_architecture = "topk"
    reads_saelens = "topk"
    sparsify_flags = (False, False)

    @dataclass(frozen=True)
    class Config(SAE.Config):
        """Options of topk."""

        k: int = option(32, help="active latents per row", gt=0)
        auxk_coef: float = option(1 / 32, help="weight of AuxK", ge=0)
        k_aux: int | None = option(None, help="dead latents per row in AuxK (default d_in / 2)", gt=0)

        def validate(self) -> None:
            """k latents must exist."""
            if self.k > self.d_sae:
                raise OptionError(f"k={self.k}: expected k <= d_sae={self.d_sae}; lower k or raise d_sae")

    config: Config

    def select(self, pre_acts: Tensor) -> Pattern:
        """Which entries of pre_acts (N, F) stay."""
        return topk_pattern(pre_acts, self.config.k)

    def activate(self, h: Tensor) -> Activation:
        """ReLU of the selected pre-activations."""
        pre_acts = self.pre_acts(h)
        pattern = self.select(pre_acts)
        return Activation(Codes(torch.relu(self.encode_at(h, pre_acts, pattern)), pattern), pre_acts)

    def penalties(self, out: SAEOutput, progress: Progress) -> dict[str, Tensor]:
        """AuxK while latents are dead."""
        k_aux = self.config.k_aux or max(1, self.config.d_in // 2)
        term = self.auxk_term(out, k_aux, self.config.auxk_coef)
        return {} if term is None else {"auxk": term}

    def saelens_fields(self) -> dict[str, Any]:
        """k, which SAELens' topk reads."""
        return {"k": self.config.k, "rescale_acts_by_decoder_norm": False}

    @classmethod
    def config_from_saelens(cls, cfg: Mapping[str, Any], shared: Mapping[str, Any]) -> "TopKSAE.Config":
        """SAELens' k is per row too."""
        return cls.Config(**shared, k=int(cfg["k"]))
