"""Metrics of an SAE in inference on held-out rows: at the end of a run, and during training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from sae_granary.cache.load.whole_contexts import Contexts
from sae_granary.models.language.language_model import EmbeddingModel, LanguageModel
from sae_granary.models.language.losses import downstream
from sae_granary.sae_core import SAE, Rows
from sae_granary.sae_core.metrics import DEAD_THRESHOLD, Evaluator, decoder_max_cosine
from sae_granary.train.optim.ema import averaged
from sae_granary.train.state.run_state import Run

VALIDATED = ("l0", "fvu", "explained_variance", "mse", "rare")


@torch.no_grad()
def evaluate(sae: SAE, batches: Iterable[Rows], dead_threshold: float = DEAD_THRESHOLD) -> dict[str, float | None]:
    """Stream rows through the SAE: l0, fvu, explained_variance, mse, cosine, l2_ratio, rare, never_fired, n_rows.

    `rare` is the share of latents that fire on less than `dead_threshold` of the rows. The SAE is left in the
    mode that it was in.
    """
    evaluator = Evaluator(sae.d_out, sae.config.d_sae, dead_threshold, sae.shards)
    with in_evaluation(sae):
        for x in batches:
            out = sae(x)
            evaluator.update(out.x, out.x_hat, out.codes)
    if not evaluator.n_rows:
        return {"n_rows": 0}
    return {
        **evaluator.result(),
        "decoder_max_cosine": decoder_max_cosine(sae.core.W_dec, shards=sae.shards),
        "n_rows": evaluator.n_rows,
    }


def evaluate_downstream(
    sae: SAE, model: LanguageModel | EmbeddingModel, contexts: Iterable[Contexts]
) -> dict[str, float | None]:
    """`models.language.losses.downstream` of an SAE, which is left in the mode that it was in."""
    with in_evaluation(sae):
        return downstream(lambda x: sae(x).x_hat, model, contexts)


def validate(run: Run, batches: Iterable[Rows]) -> dict[str, float]:
    """`val/<name>` of the weights that would be the result now; counts toward `early_stop`.

    Inference thresholds are the training averages here: calibration happens at the end.
    """
    with averaged(run.sae, run.ema):
        numbers = evaluate(run.sae, batches, run.config.dead_threshold)
    fvu = numbers.get("fvu")
    if fvu is None:
        return {}
    run.score = fvu
    run.patience.saw(run.score)
    return {f"val/{name}": value for name in VALIDATED if (value := numbers[name]) is not None}


@contextmanager
def in_evaluation(sae: SAE) -> Iterator[None]:
    """Context manager: the SAE is in evaluation mode inside, afterwards in its previous mode."""
    training = sae.training
    sae.eval()
    try:
        yield
    finally:
        sae.train(training)
