"""Validation while training: the final evaluation in small, every `eval_every` steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from sae_granary.train.optim.ema import averaged
from sae_granary.train.result.evaluate import evaluate
from sae_granary.train.state.run_state import Run

NAMES = ("l0", "fvu", "explained_variance", "mse", "dead")


def is_due(run: Run) -> bool:
    """Whether the step that was just taken is validated."""
    return _every(run.step, run.config.eval_every)


def validate(run: Run, batches: Iterable[Tensor | Mapping[str, Tensor]]) -> dict[str, float]:
    """`val/<name>` of the weights that would be the result now; counts towards `early_stop`.

    A threshold of inference is the average of training here: the calibration comes at the end.
    """
    with averaged(run.sae, run.ema):
        numbers = evaluate(run.sae, batches, run.config.dead_threshold)
    if "fvu" not in numbers:
        return {}
    run.score = numbers["fvu"]
    run.patience.saw(run.score)
    return {f"val/{name}": numbers[name] for name in NAMES}


def _every(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
