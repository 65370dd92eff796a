"""Recipes of `jumprelu`, and its options."""

import math
from dataclasses import dataclass

from sae_granary.sae_core.errors import OptionError
from sae_granary.sae_core.options import SharedConfig, option


@dataclass(frozen=True)
class Recipe:
    """How thresholds are trained, with the defaults of the options that depend on it."""

    penalty: str | None = None  # tanh, l0, l0_target (squared relative distance to it), jump (see `_l0`)
    coef: float = 1.0
    warmup: float = 1.0  # share of the run over which the coefficient rises
    warmup_steps: int | None = None  # the same in steps
    threshold: float | None = 0.1  # at the start; None: 0.001 sqrt(d_in)
    bandwidth: float | None = 2.0  # None: 0.001 sqrt(d_in)
    logarithm: bool = True  # log theta is the parameter
    relative: bool = False  # bandwidth in units of theta, unit decoder rows, AuxK, and a start at the wanted L0
    unit_rows: bool = False
    to_input: bool = False  # the straight-through gradient reaches the pre-activations too
    revives: str | None = None  # which latents the pre-activation loss is for: dead or all


def _relative(penalty: str | None, coef: float = 0.0) -> Recipe:
    return Recipe(penalty, coef, warmup=0.25, bandwidth=0.3, relative=True, unit_rows=True)


RECIPES = {
    "constraint": _relative(None),
    "l0_penalty": _relative("l0", 0.3),
    "tanh_penalty": _relative("jump", 0.3),
    "gemma": Recipe("l0", warmup_steps=10_000, threshold=None, bandwidth=None, unit_rows=True),
    "anthropic": Recipe("tanh", 10.0, to_input=True, revives="all"),
    # As of earlier versions: runs and checkpoints with them continue bit for bit.
    "tanh": Recipe("tanh", 10.0, logarithm=False, revives="dead"),
    "l0": Recipe("l0", threshold=None, bandwidth=None, logarithm=False),
    "l0_target": Recipe("l0_target", threshold=None, bandwidth=None, logarithm=False),
}


@dataclass(frozen=True)
class JumpReLUConfig(SharedConfig):
    """Options of jumprelu."""

    recipe: str = option(
        "constraint",
        help="How thresholds are trained: L0 as a constraint, or a penalty with a coefficient.",
        choices=tuple(RECIPES),
        unsaved="tanh",
    )
    l0_target: float = option(
        32.0,
        help="Target L0 of constraint and l0_target; the L0 at which l0_penalty and tanh_penalty start.",
        unit="latents per row",
        gt=0,
    )
    l0_coef: float | None = option(
        None,
        help="Weight of the penalty, for rows scaled to E|x|^2 = d_in; not for constraint.",
        default_words="0.3 for l0_penalty and tanh_penalty, 10 for anthropic and tanh, else 1",
        ge=0,
    )
    l0_warmup: float | None = option(
        None,
        help="Share of the run over which l0_coef rises from 0.",
        default_words="0.25 for l0_penalty and tanh_penalty, 10,000 steps for gemma, else 1",
        ge=0,
        le=1,
    )
    tanh_scale: float = option(4.0, help="c in tanh(c z |W_dec|).", gt=0)
    dead_coef: float = option(
        3e-6, help="Weight of the pre-activation loss: of dead latents for tanh, of all for anthropic.", ge=0
    )
    auxk_coef: float = option(1 / 32, help="Weight of the AuxK loss of constraint, l0_penalty and tanh_penalty.", ge=0)
    threshold_init: float | None = option(
        None,
        help="Initial threshold.",
        default_words="0.1 for tanh and anthropic, 0.001 sqrt(d_in) for l0, l0_target and gemma, else from l0_target",
        gt=0,
    )
    bandwidth: float | None = option(
        None,
        help="Width of the kernel through which thresholds get a gradient.",
        default_words="2 for tanh and anthropic, 0.001 sqrt(d_in) for l0, l0_target and gemma, else 0.3 * threshold",
        gt=0,
    )

    def validate(self) -> None:
        """Refuse options that the recipe does not use."""
        if self.recipe == "constraint":
            for name in ("l0_coef", "l0_warmup"):
                if (value := getattr(self, name)) is not None:
                    raise OptionError(
                        f"{name}={value!r} has no effect with recipe='constraint', which keeps L0 at l0_target: set "
                        "l0_target, or choose a recipe with a coefficient (l0_penalty, tanh_penalty, tanh ...)"
                    )
        if not RECIPES[self.recipe].relative:
            return
        if self.l0_target > self.d_sae:
            raise OptionError(
                f"l0_target={self.l0_target:g}: expected l0_target <= d_sae={self.d_sae}; lower it or raise d_sae"
            )
        if self.kernel_width >= 2:
            raise OptionError(f"bandwidth={self.bandwidth}: expected a value < 2, it is in units of the threshold")

    @property
    def wanted_l0(self) -> float | None:
        """The target L0 of the recipe; None if a coefficient decides."""
        return self.l0_target if RECIPES[self.recipe].penalty in (None, "l0_target") else None

    @property
    def target(self) -> str:
        """The target L0, or the coefficient that decides."""
        if self.wanted_l0 is not None:
            return f"l0_target={self.l0_target:g}"
        return f"l0_coef={RECIPES[self.recipe].coef if self.l0_coef is None else self.l0_coef:g}"

    @property
    def threshold_start(self) -> float:
        """Initial thresholds, in units of the normalized pre-activations."""
        return self.threshold_init or RECIPES[self.recipe].threshold or small(self.d_in)

    def warmup_share(self, n_steps: int) -> float:
        """Share of a run over which the coefficient rises."""
        recipe = RECIPES[self.recipe]
        if self.l0_warmup is not None:
            return self.l0_warmup
        return recipe.warmup if recipe.warmup_steps is None else min(1.0, recipe.warmup_steps / n_steps)

    @property
    def kernel_width(self) -> float:
        """Width of the straight-through kernel: only training uses it."""
        return self.bandwidth or RECIPES[self.recipe].bandwidth or small(self.d_in)


def small(d_in: int) -> float:
    """Bandwidth and first threshold of arXiv 2407.14435, 0.001 where E|x|^2 = 1, in units where E|x|^2 = d_in."""
    return 0.001 * math.sqrt(d_in)
