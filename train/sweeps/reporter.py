"""Progress events of a sweep."""

from __future__ import annotations

from collections.abc import Sequence

from sae_granary.train.sinks.sink import BaseSink
from sae_granary.train.sweeps.sweep_plan import Entry, Group, Plan


class Reporter:
    """Receives the events of a sweep; this base class ignores them."""

    def start(self, plan: Plan, group: Group) -> None:
        """A group starts."""

    def sinks(self, entry: Entry) -> Sequence[BaseSink]:
        """Sinks of one SAE, beside its own files."""
        return ()

    def ended(self, name: str, how: str) -> None:
        """An SAE is complete, was complete already, or failed."""

    def message(self, text: str) -> None:
        """A message for the user."""

    def close(self) -> None:
        """Release resources, also after an error."""
