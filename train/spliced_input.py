"""A training step through the language model: contexts in, the SAE's losses out.

Shapes: N kept tokens, D = d_in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sae_granary.cache.load.whole_contexts import Contexts
from sae_granary.models.language.language_model import LanguageModel
from sae_granary.models.language.losses import at_kept, cross_entropy, kl_divergence
from sae_granary.sae_core import SAE, Progress, SAEOutput
from sae_granary.sae_core.kernels.deferred import Bounded
from sae_granary.train.step_input import Terms


@dataclass(frozen=True, eq=False)
class SplicedInput:
    """Contexts for a training step through the language model; gradients reach the SAE only.

    The loss, kl or ce, stands where the SAE's reconstruction loss would; penalties stay. `balanced` keeps both, as
    Karvonen's KL finetuning does (arXiv 2503.17272): (recon + kl * sg(recon / kl)) / 2. Their magnitudes are equal at
    every step and the sum is that of the reconstruction loss alone, so that penalties keep their weight.
    """

    model: LanguageModel
    contexts: Contexts
    kind: str
    balanced: bool = False

    @property
    def n_rows(self) -> int:
        """Kept tokens."""
        return self.contexts.n_rows

    @property
    def n_total(self) -> int:
        """Kept tokens: ranks do not share them."""
        return self.n_rows

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.model.device

    def split(self, n_parts: int) -> Iterator[SplicedInput]:
        """Split into at most n parts with about equally many contexts."""
        yield from (replace(self, contexts=part) for part in self.contexts.split(n_parts))

    def bounded(self) -> list[Bounded]:
        """None: token ids are finite; what the model makes of them shows in the loss."""
        return []

    def terms(self, sae: SAE, progress: Progress) -> Terms:
        """Run the model with the SAE spliced in. Each pass over the cache masks other tokens of an encoder's text."""
        tokens = self.model.tokens(self.contexts, mask_seed=self.contexts.state.epoch)
        outputs: list[SAEOutput] = []

        def rows(x: Tensor) -> Tensor:
            outputs.append(sae(x))
            return outputs[0].x_hat

        clean = None
        if self.kind == "kl":
            with torch.no_grad():
                clean = self.model.logits(tokens)
        spliced = self.model.logits(tokens, at_kept(tokens, rows))
        total = cross_entropy(spliced, tokens.targets) if clean is None else kl_divergence(clean, spliced)
        loss = total / max(len(tokens.targets), 1)
        terms = sae.losses(outputs[0], progress)
        recon = terms.pop(sae.loss_scale.name)
        first = {self.kind: loss}
        if self.balanced:
            ratio = (recon / loss.clamp_min(1e-12)).detach()
            first = {sae.loss_scale.name: recon / 2, self.kind: loss * ratio / 2}
        return Terms(outputs[0], {**first, **terms}, {self.kind: float(loss.detach())})
