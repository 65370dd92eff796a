"""When validations stop paying: `early_stop`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Patience:
    """The best validation so far, and how many came since."""

    best: float | None = None
    since: int = 0

    def saw(self, score: float) -> None:
        """Count a validation; lower is better."""
        better = self.best is None or score < self.best
        self.best, self.since = (score, 0) if better else (self.best, self.since + 1)

    def is_over(self, limit: int | None) -> bool:
        """Whether `limit` validations in a row were no better than the best."""
        return limit is not None and self.since >= limit
