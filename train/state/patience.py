"""Early stopping: when validations stop improving."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Patience:
    """The best validation so far, and how many followed without improvement."""

    best: float | None = None
    since: int = 0

    def saw(self, score: float) -> None:
        """Count a validation; lower is better, and anything finite is better than NaN."""
        better = math.isfinite(score) and (self.best is None or not self.best <= score)
        self.best, self.since = (score, 0) if better else (self.best, self.since + 1)

    def is_over(self, limit: int | None) -> bool:
        """Whether the last `limit` validations did not improve on the best."""
        return limit is not None and self.since >= limit
