"""Which hook points of a cache are trained on: `--hook`, `--layer 2,4`, `--layers all`, or the same in YAML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from sae_granary import sae_core
from sae_granary.cache.opening import open_cache
from sae_granary.common.errors import ConfigError
from sae_granary.common.settings.coerce import coerce
from sae_granary.common.settings.yaml_file import Settings
from sae_granary.train.config.flags import Given
from sae_granary.train.config.merge import merge_layers

_LAYER = re.compile(r"layer_(\d+)")


def place_hooks(given: Given) -> tuple[Given, tuple[str, ...]]:
    """The hook points of the flags or the file, either as the setting `hook` or as those that get an SAE each.

    One is a setting, and so are several for a type that reads several. Raises ConfigError and what opening the cache
    raises.
    """
    if not given.hooks and given.layer_stride is None:
        return given, ()
    settings = merge_layers([values for _, values in given.layers()])
    hooks = given.hooks
    if "all" in hooks or given.layer_stride is not None:
        if not settings.get("cache"):
            raise ConfigError("--layers all and --layer-stride choose from the layers of a cache: name it with --cache")
        opened = open_cache(
            str(settings["cache"]), allow_incomplete=True, by_shard=bool(settings.get("shuffle_shards"))
        )
        hooks = layer_hooks(tuple(opened.hook_points), hooks, given.layer_stride)
    if twice := [name for i, name in enumerate(hooks) if name in hooks[:i]]:
        raise ConfigError(f"--layer (or --hook) names {twice[0]} twice; remove one")
    given = replace(given, hooks=(), layer_stride=None)
    name = settings.get("type")
    if len(hooks) > 1 and not (isinstance(name, str) and sae_core.registry.get(name).reads.several):
        return given, hooks
    if given.file and given.hooks_of_file:
        file, values = given.file
        return replace(given, file=(file, Settings(values, {"hook": hooks}))), ()
    return replace(given, flags={**given.flags, "hook": hooks}), ()


def layer_hooks(available: Sequence[str], named: Sequence[str], stride: str | None) -> tuple[str, ...]:
    """Every n-th of the named hook points. `all` (or none): every layer_N in ascending order, or all if there is none.

    Raises ConfigError.
    """
    step = 1 if stride is None else coerce("layer_stride", stride, int)
    if step < 1:
        raise ConfigError(f"layer_stride={step}: expected a value >= 1")
    if "all" in named and len(named) > 1:
        raise ConfigError("--layers all includes every layer: leave out the other layers and hook points")
    if named and "all" not in named:
        return tuple(named[::step])
    numbered = sorted((name for name in available if _LAYER.fullmatch(name)), key=lambda n: int(n.split("_")[1]))
    return tuple(numbered or available)[::step]
