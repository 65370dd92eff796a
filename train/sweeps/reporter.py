"""What a sweep tells while it runs."""

from __future__ import annotations

from collections.abc import Sequence

from sae_granary.train.sinks.sink import Sink
from sae_granary.train.sweeps.sweep_plan import Entry, Group, Plan


class Reporter:
    """Receives a sweep as it happens; this one ignores everything."""

    def start(self, plan: Plan, group: Group) -> None:
        """A group starts."""

    def sinks(self, entry: Entry) -> Sequence[Sink]:
        """Sinks of one SAE, beside its own files."""
        return ()

    def ended(self, name: str, how: str) -> None:
        """An SAE is complete, was so already, or failed."""

    def message(self, text: str) -> None:
        """Something a person should know."""

    def close(self) -> None:
        """Release what is held, also after an error."""
