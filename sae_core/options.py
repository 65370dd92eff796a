"""Options of a variant: a dataclass field with a bound, a help line, and one place that checks them all.

`SharedConfig` holds the options that every variant has.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from sae_granary.common.errors import nearest
from sae_granary.common.signed import short
from sae_granary.sae_core.errors import OptionError

MAX_INT = 2**63 - 1
NORMALIZATIONS = ("dataset", "mean", "mean+dataset", "unit_norm", "none")
LM_LOSSES = ("ce", "kl")  # through a language model: the trainer puts them in the place of the reconstruction loss
LOSSES = ("fvu", "mse", "nmse", *LM_LOSSES)
B_DEC_INITS = ("geometric_median", "mean", "zero")
PRE_ACTS, FREE = "pre_acts", "free"  # units: what is multiplied by a number when the pre-activations are, what is not


def option(
    default: Any = MISSING,
    *,
    help: str,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[str, ...] | None = None,
    unit: str = FREE,
    options_of: str | None = None,
    unsaved: Any = MISSING,
) -> Any:
    """Declare a Config field: its default, a help line with the unit, and the range that `check` enforces.

    `unit=PRE_ACTS` says that inference adds the option to pre-activations or compares it with them: files of an SAE
    are in other units, so saving rescales it. Raises ValueError if such an option has a bound other than 0.
    `options_of` is for a mapping of options of another type, and names the option that says which.
    `unsaved` is what a saved configuration that lacks the option means, where the default was another.
    """
    if unit == PRE_ACTS and any(bound not in (None, 0) for bound in (ge, gt, le, lt)):
        raise ValueError("an option in units of pre-activations is rescaled: its only bound can be 0")
    metadata = {"help": help, "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices, "unit": unit}
    metadata["options_of"] = options_of
    metadata |= {} if unsaved is MISSING else {"unsaved": unsaved}
    return field(default=default, metadata=metadata) if default is not MISSING else field(metadata=metadata)


def in_pre_acts(config: Any) -> Mapping[str, float]:
    """Return the options of a Config that are in units of pre-activations, without those that are None."""
    named = {spec.name: getattr(config, spec.name) for spec in fields(config) if spec.metadata.get("unit") == PRE_ACTS}
    return {name: float(value) for name, value in named.items() if value is not None}


def as_saved(cls: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a saved Config, those that it lacks as they were when it was written."""
    meant = {spec.name: spec.metadata["unsaved"] for spec in fields(cls) if "unsaved" in spec.metadata}
    return {**meant, **options}


@cache
def _types(cls: Any) -> dict[str, Any]:
    """The type of each field; none where annotations name what is not global."""
    try:
        return get_type_hints(cls)
    except NameError:
        return {}


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value, perhaps read from JSON, has a declared type. An integer is a float."""
    inner = get_args(kind)
    if isinstance(kind, UnionType):
        return any(_is_of(value, each) for each in inner)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple | list) and all(_is_of(each, inner[0]) for each in value)
    runtime = get_origin(kind) or kind
    return not isinstance(runtime, type) or isinstance(value, runtime)


def check(config: Any) -> None:
    """Check every field of a Config against its type and the range it declares.

    Raises OptionError with the option's name, its value and what was expected.
    """
    types = _types(type(config))  # type: ignore[arg-type]
    for spec in fields(config):
        value = getattr(config, spec.name)
        bounds = spec.metadata
        if spec.name in types and not _is_of(value, types[spec.name]):
            kind = getattr(types[spec.name], "__name__", str(types[spec.name]))
            raise OptionError(f"{spec.name}={short(value)}: expected {kind}")
        if isinstance(value, Integral) and abs(int(value)) > MAX_INT:
            raise OptionError(f"{spec.name}={short(value)}: expected a value <= {MAX_INT}")
        if value is None or not bounds:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise OptionError(f"{spec.name}={value!r}: expected a finite number")
        if bounds["choices"] is not None and value not in bounds["choices"]:
            hint = nearest(str(value), bounds["choices"])
            raise OptionError(f"{spec.name}={value!r}: expected one of {', '.join(bounds['choices'])}{hint}")
        if bounds["ge"] is not None and not value >= bounds["ge"]:
            raise OptionError(f"{spec.name}={value!r}: expected a value >= {bounds['ge']}")
        if bounds["gt"] is not None and not value > bounds["gt"]:
            raise OptionError(f"{spec.name}={value!r}: expected a value > {bounds['gt']}")
        if bounds["lt"] is not None and not value < bounds["lt"]:
            raise OptionError(f"{spec.name}={value!r}: expected a value < {bounds['lt']}")
        if bounds["le"] is not None and not value <= bounds["le"]:
            raise OptionError(f"{spec.name}={value!r}: expected a value <= {bounds['le']}")


@dataclass(frozen=True)
class SharedConfig:
    """Options of every variant."""

    d_in: int = option(help="width of the activations", gt=0)
    d_sae: int = option(help="number of latents", gt=0)
    normalize: str = option("dataset", help="input normalization", choices=NORMALIZATIONS)
    loss: str = option("fvu", help="reconstruction loss, or one through the model", choices=LOSSES)
    b_dec_init: str = option("geometric_median", help="start of b_dec", choices=B_DEC_INITS)
    dead_after_tokens: int = option(10_000_000, help="rows without firing after which a latent is dead", gt=0)

    def __post_init__(self) -> None:
        check(self)
        self.validate()

    def validate(self) -> None:
        """Check what spans several options; raise OptionError."""

    @property
    def wanted_l0(self) -> float | None:
        """The L0 that was asked for: k of the k-sparse types; None where nothing was."""
        return getattr(self, "k", None)

    @property
    def target(self) -> str:
        """What decides the sparsity, as option and value: `k=32`, `l1_coef=5`; empty where no option does."""
        name = next((name for name in ("k", "l1_coef") if getattr(self, name, None) is not None), None)
        return "" if name is None else f"{name}={getattr(self, name):g}"


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
