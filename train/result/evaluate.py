"""Metrics of an SAE in inference on rows that it has not seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sae_granary.sae_core import SAE
from sae_granary.sae_core.metrics import DEAD_THRESHOLD, Evaluator, decoder_max_cosine


@torch.no_grad()
def evaluate(
    sae: SAE, batches: Iterable[Tensor | Mapping[str, Tensor]], dead_threshold: float = DEAD_THRESHOLD
) -> dict[str, float]:
    """Stream rows through the SAE: l0, fvu, explained_variance, mse, cosine, l2_ratio, dead, never_fired, n_rows.

    `dead` is the share of latents that fire on less than `dead_threshold` of the rows. The SAE is left in the
    mode that it was in.
    """
    training = sae.training
    sae.eval()
    evaluator = Evaluator(sae.d_out, sae.config.d_sae, dead_threshold)
    try:
        for x in batches:
            out = sae(x)
            evaluator.update(out.x, out.x_hat, out.codes)
    finally:
        sae.train(training)
    if not evaluator.n_rows:
        return {"n_rows": 0}
    return {
        **evaluator.result(),
        "decoder_max_cosine": decoder_max_cosine(sae.core.W_dec),
        "n_rows": evaluator.n_rows,
    }
