"""Matching pursuit: k greedy steps, each on the residual of the previous ones (Costa et al., arXiv 2506.03093)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_granary.common.signed import short
from sae_granary.sae_core.autograd import Centered
from sae_granary.sae_core.base import SAE
from sae_granary.sae_core.codes import Codes, Pattern
from sae_granary.sae_core.data import Activation
from sae_granary.sae_core.errors import NotAnSAEError, OptionError
from sae_granary.sae_core.files import saelens
from sae_granary.sae_core.files.disk import entry
from sae_granary.sae_core.latents import PerLatent
from sae_granary.sae_core.options import option
from sae_granary.sae_core.pre_acts import PreActs
from sae_granary.sae_core.registry import register


@register("matching_pursuit")
class MatchingPursuitSAE(SAE):
    """r_0 = x - b_dec; j_t = argmax W_dec r_t, z_t = ReLU(W_dec[j_t] . r_t), r_{t+1} = r_t - z_t W_dec[j_t].

    The dictionary is its own encoder (unit rows). A step costs k encoder products. The values of a latent that is
    chosen twice add up: it is one active latent.
    """

    unit_decoder = True
    has_encoder = False
    latents: ClassVar[Mapping[str, PerLatent]] = {}  # a latent is its decoder row

    @dataclass(frozen=True)
    class Config(SAE.Config):
        """Options of matching_pursuit."""

        k: int = option(32, help="Greedy steps per row.", gt=0, short="-k", common=True)

        def validate(self) -> None:
            """Check k <= d_sae."""
            if self.k > self.d_sae:
                raise OptionError(f"k={self.k}: expected k <= d_sae={self.d_sae}; lower k or raise d_sae")

    config: Config

    def pre_acts(self, h: Centered) -> PreActs:
        """The scores of the first step."""
        return PreActs(h.values, self.W_dec.t(), self.W_dec.new_zeros(self.config.d_sae))

    def activate(self, h: Centered) -> Activation:
        """Run k greedy steps on each row."""
        residual, chosen, values = h.values, [], []
        for _ in range(self.config.k):
            with torch.no_grad():
                scores = residual @ self.W_dec.t()
                latents = scores.argmax(1)
            # The gradient of an index adds in the order of the threads on the CPU; an embedding's has one order.
            atoms = F.embedding(latents, self.W_dec)
            value = torch.relu((residual * atoms).sum(1))
            residual = residual - value[:, None] * atoms
            chosen.append(latents)
            values.append(value)
        indices = torch.stack(chosen, dim=1)
        merged = merge_repeats(indices, torch.stack(values, dim=1))
        codes = Codes(merged.reshape(-1), Pattern.fixed_k(indices, self.config.d_sae))
        return Activation(codes, self.pre_acts(h))


def merge_repeats(latents: Tensor, values: Tensor) -> Tensor:
    """Values (N, k) in which repeats of a latent within a row are summed at its first position and 0 elsewhere."""
    ordered, order = latents.sort(dim=1, stable=True)
    places = torch.arange(latents.shape[1], device=latents.device).expand_as(latents)
    repeated = torch.zeros_like(latents, dtype=torch.bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    first = order.gather(1, places.masked_fill(repeated, 0).cummax(dim=1).values)
    return torch.zeros_like(values).scatter_add(1, torch.zeros_like(order).scatter(1, order, first), values)


def _options(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse SAELens' stopping rules, which give different codes. Raises NotAnSAEError."""
    for rule in ("residual_threshold", "stop_on_duplicate_support"):
        if cfg.get(rule, True):
            raise NotAnSAEError(
                f"{rule}={short(cfg.get(rule, 'default'))}: expected 0 or false, each row takes k steps"
            )
    return {"k": entry(cfg, "d_in" if cfg.get("max_iterations") is None else "max_iterations", int)}


# k steps whatever the residual: SAELens' own stopping rules are switched off.
saelens.express(
    MatchingPursuitSAE,
    "matching_pursuit",
    fields=lambda sae: {
        "max_iterations": sae.config.k,
        "residual_threshold": 0.0,
        "stop_on_duplicate_support": False,
    },
    options=_options,
)
