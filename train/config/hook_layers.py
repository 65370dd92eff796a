"""`--layers all`, `--layers 2,4`, `--layer-stride 2`: which hook points of a cache get an SAE each."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sae_granary.common.errors import ConfigError, nearest

_LAYER = re.compile(r"layer_(\d+)")


def layer_hooks(available: Sequence[str], layers: str | None, stride: int | None = None) -> tuple[str, ...]:
    """Hook points by number, ascending. `all` (or None): every layer_N, or every hook point where none is called so.

    Raises ConfigError for a layer that is not there or is named twice.
    """
    numbered = sorted((name for name in available if _LAYER.fullmatch(name)), key=lambda n: int(n.split("_")[1]))
    if layers is None or layers == "all":
        chosen = numbered or list(available)
    else:
        chosen = [part if not part.isdigit() else f"layer_{part}" for part in map(str.strip, layers.split(","))]
    for i, name in enumerate(chosen):
        if name not in available:
            raise ConfigError(
                f"--layers: the cache has no hook point {name!r} (it has: {', '.join(available)})"
                f"{nearest(name, available)}"
            )
        if name in chosen[:i]:
            raise ConfigError(f"--layers names {name} twice; remove one")
    return tuple(chosen[:: stride or 1])
