"""The training loss on other rows: its terms, for the weights of a run's newest checkpoint.

The inference form of an SAE cannot provide it: normalization is folded, dead latents are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from sae_granary import sae_core
from sae_granary.common.finished_run import CHECKPOINTS, NotARunError, read_summary
from sae_granary.sae_core import SAE, Progress, Rows, SAEError

AVERAGED = "ema.safetensors"  # of a run whose result is not what its checkpoint was trained as


class TrainingLoss:
    """The loss of an SAE as in the last step of its training, over batches. Call `update`, then `result`."""

    def __init__(self, sae: SAE, n_steps: int) -> None:
        self._sae, self._last = sae.train(), Progress(n_steps - 1, n_steps)
        self._sums: dict[str, float] = {}
        self._n_rows = 0

    @classmethod
    def of_run(cls, folder: Path, device: torch.device) -> TrainingLoss | None:
        """Load from a run's folder; None if it is not finished, has no checkpoint, or averaged its weights."""
        steps = sorted((folder / CHECKPOINTS).glob("step_*"))
        if not steps or (steps[-1] / AVERAGED).is_file():
            return None
        try:
            n_steps = read_summary(folder).get("steps")
            sae = sae_core.load_native(steps[-1] / "sae").to(device)
        except (NotARunError, SAEError):
            return None
        return cls(sae, n_steps) if isinstance(n_steps, int) and n_steps > 0 else None

    @torch.no_grad()
    def update(self, rows: Rows) -> None:
        """Add raw rows (N, D) by hook point; a batch-wide selection is made over these N rows."""
        n_rows = len(next(iter(rows.values())))
        self._sae.begin_step(self._last)
        for name, value in self._sae.losses(self._sae(rows), self._last).items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value) * n_rows
        self._n_rows += n_rows

    def result(self) -> Mapping[str, float]:
        """The mean of each term over the rows, by the names of metrics.jsonl without `losses/`; their sum is `loss`."""
        terms = {name: value / self._n_rows for name, value in self._sums.items()}
        return {"loss": sum(terms.values()), **terms}
