"""Options of a variant: a dataclass field with a bound, a help line, and one place that checks them all."""

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from sae_granary.sae_core.errors import OptionError


def option(
    default: Any = MISSING,
    *,
    help: str,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """Declare a Config field: its default, a help line with the unit, and the range that `check` enforces."""
    metadata = {"help": help, "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices}
    return field(default=default, metadata=metadata) if default is not MISSING else field(metadata=metadata)


def check(config: Any) -> None:
    """Check every field of a Config against the range it declares.

    Raises OptionError with the option's name, its value and the bound.
    """
    for spec in fields(config):
        value = getattr(config, spec.name)
        bounds = spec.metadata
        if value is None or not bounds:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise OptionError(f"{spec.name}={value!r}: expected a finite number")
        if bounds["choices"] is not None and value not in bounds["choices"]:
            raise OptionError(f"{spec.name}={value!r}: expected one of {', '.join(bounds['choices'])}")
        if bounds["ge"] is not None and not value >= bounds["ge"]:
            raise OptionError(f"{spec.name}={value!r}: expected a value >= {bounds['ge']}")
        if bounds["gt"] is not None and not value > bounds["gt"]:
            raise OptionError(f"{spec.name}={value!r}: expected a value > {bounds['gt']}")
        if bounds["lt"] is not None and not value < bounds["lt"]:
            raise OptionError(f"{spec.name}={value!r}: expected a value < {bounds['lt']}")
        if bounds["le"] is not None and not value <= bounds["le"]:
            raise OptionError(f"{spec.name}={value!r}: expected a value <= {bounds['le']}")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: the optimizer step about to be taken, of how many."""

    step: int
    n_steps: int

    def ramp(self, fraction: float) -> float:
        """Rise linearly from 1/n to 1 over the first `fraction` of the run; 1 from there on."""
        n_ramp = int(self.n_steps * fraction)
        return min(1.0, (self.step + 1) / n_ramp) if n_ramp > 0 else 1.0

    def anneal(self, start: float, end: float, begin: float) -> float:
        """Stay at `start` until the share `begin` of the run is over, then move linearly to `end` at its last step."""
        share = self.step / max(self.n_steps - 1, 1)
        return start if share <= begin else start + (end - start) * (share - begin) / (1 - begin)
