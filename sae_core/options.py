"""Options of a variant: a dataclass field with a bound, a help line, and one place that checks them all.

`SharedConfig` holds the options that every variant has.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from sae_granary.common.settings.declare import BOUNDS, check, setting
from sae_granary.sae_core.errors import OptionError

NORMALIZATIONS = ("dataset", "mean", "mean+dataset", "unit_norm", "none")
LM_LOSSES = ("ce", "kl")  # through a language model: the trainer puts them in the place of the reconstruction loss
LOSSES = ("fvu", "mse", "nmse", *LM_LOSSES)
B_DEC_INITS = ("geometric_median", "mean", "zero")
PANEL = "Options of the types"  # of the help
PRE_ACTS, FREE = "pre_acts", "free"  # units: what is multiplied by a number when the pre-activations are, what is not


def option(
    default: Any = MISSING,
    *,
    help: str,
    unit: str = "",
    options_of: str | None = None,
    unsaved: Any = MISSING,
    **declared: Any,
) -> Any:
    """Declare a Config field, as `common.settings.declare.setting` does: default, help, range, choices.

    `unit=PRE_ACTS` says that inference adds the option to pre-activations or compares it with them: files of an SAE
    are in other units, so saving rescales it. Raises ValueError if such an option has a bound other than 0.
    `options_of` is for a mapping of options of another type, and names the option that says which.
    `unsaved` is what a saved configuration that lacks the option means, where the default was another.
    """
    if unit == PRE_ACTS and any(declared.get(bound) for bound in BOUNDS):
        raise ValueError("an option in units of pre-activations is rescaled: its only bound can be 0")
    panel = "" if declared.get("common") else PANEL
    more = {"options_of": options_of} | ({} if unsaved is MISSING else {"unsaved": unsaved})
    return setting(default, help=help, section="model", panel=panel, unit=unit, **declared, **more)


def in_pre_acts(config: Any) -> Mapping[str, float]:
    """Return the options of a Config that are in units of pre-activations, without those that are None."""
    named = {spec.name: getattr(config, spec.name) for spec in fields(config) if spec.metadata.get("unit") == PRE_ACTS}
    return {name: float(value) for name, value in named.items() if value is not None}


def as_saved(cls: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a saved Config, those that it lacks as they were when it was written."""
    meant = {spec.name: spec.metadata["unsaved"] for spec in fields(cls) if "unsaved" in spec.metadata}
    return {**meant, **options}


@dataclass(frozen=True)
class SharedConfig:
    """Options of every variant."""

    d_in: int = option(help="Width of the activations.", gt=0)
    d_sae: int = option(help="Number of latents.", default_words="8 * d_in", gt=0, common=True)
    normalize: str = option("dataset", help="Input normalization.", choices=NORMALIZATIONS)
    loss: str = option("fvu", help="Reconstruction loss; kl and ce go through the language model.", choices=LOSSES)
    b_dec_init: str = option("geometric_median", help="Initialization of b_dec.", choices=B_DEC_INITS)
    dead_after_tokens: int = option(
        10_000_000,
        help="A latent that has not fired for this long is dead.",
        unit="rows",
        default_words="5 % of the run",
        gt=0,
    )

    def __post_init__(self) -> None:
        check(self, OptionError)
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
