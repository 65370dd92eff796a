"""A grid of settings and the points that it spans: pure functions, before any cache is opened.

A point is flat settings. A key that the point's type does not have is left out of it (vanilla has no k), so that points
become equal; `train.sweeps.sweep_plan` trains equal points once.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sae_granary import sae_core
from sae_granary.common.errors import ConfigError, nearest
from sae_granary.common.settings.yaml_file import Settings
from sae_granary.train.config.merge import TRAINER_KEYS, unknown_setting, variant_keys

# In a grid these mean the initialization's seed and the hook point of one SAE.
ALIASES = {"seed": "init_seed", "layer": "hook", "layers": "hook"}
# Where a sweep is, not what it trains.
NOT_IN_GRIDS = ("cache", "name", "runs_dir", "device")


@dataclass(frozen=True)
class Point:
    """One combination: the settings that apply, and the grid's settings that its type lacks."""

    settings: Mapping[str, Any]
    varied: Mapping[str, Any]  # the grid's part of the settings
    dropped: tuple[str, ...] = ()


def parse_grid(texts: Iterable[str]) -> dict[str, list[str]]:
    """`key=value,value` texts of `--grid`. Commas inside brackets do not separate: fractions=[0.1,1],[0.5,1]."""
    out: dict[str, list[str]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        name = key.strip().replace("-", "_")
        if not equals or not name:
            raise ConfigError(f"--grid {text!r}: expected key=value,value")
        if name in out:
            raise ConfigError(f"--grid {name} is given twice: name all its values once, {name}=a,b,c")
        out[name] = _split(values)
    return out


def _split(values: str) -> list[str]:
    return [part.strip() for part in re.split(r",(?![^\[{(]*[\]})])", values)]


def check_grid(grid: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The grid under the names of settings. Raises ConfigError for one that is empty or repeats itself."""
    if not grid:
        raise ConfigError("the grid is empty: give at least one --grid key=value,value, or a grid: section in --config")
    out: dict[str, tuple[Any, ...]] = {}
    for key, values in grid.items():
        name = ALIASES.get(str(key).replace("-", "_"), str(key).replace("-", "_"))
        values = _split(values) if isinstance(values, str) else values  # `k: 16,32` in a file
        listed = tuple(values) if isinstance(values, list | tuple) else (values,)
        if key in ("layer", "layers"):
            if "all" in listed:
                raise ConfigError(f"the grid holds {key}=all, which is not the name of a layer: give --layers all")
            listed = tuple(f"layer_{value}" for value in listed)
        if name in NOT_IN_GRIDS:
            raise ConfigError(f"the grid holds {name}, which is one for a whole sweep: give --{name.replace('_', '-')}")
        if name in out:
            raise ConfigError(f"the grid holds {name} twice (seed means init_seed, layer means hook): keep one of them")
        if not listed or "" in listed:
            raise ConfigError(f"the grid's {key} has an empty value: expected {key}=value,value")
        repeated = [value for i, value in enumerate(listed) if str(value) in map(str, listed[:i])]
        if repeated:
            raise ConfigError(f"the grid repeats itself: {key} holds {repeated[0]} twice; remove one")
        out[name] = listed
    return out


def expand(grid: Mapping[str, tuple[Any, ...]], common: Mapping[str, Any]) -> list[Point]:
    """Every combination of a checked grid on top of common settings, in the order of the grid's keys.

    Raises ConfigError for a key that is set twice, and for one that no type of the sweep knows.
    """
    if both := [key for key in grid if common.get(key) is not None]:
        raise ConfigError(f"{both[0]} is set both in the grid and for all SAEs: keep one of them")
    types = [str(t) for t in grid.get("type", (common.get("type") or "",)) if t]
    if not types:
        names = sae_core.registry.names()
        anywhere = {"type", *TRAINER_KEYS, *ALIASES}.union(*(variant_keys(name) for name in names))
        hints = [f"; {key!r} is unknown{nearest(key, anywhere)}" for key in grid if key not in anywhere]
        raise ConfigError(f"no type was given; add --type or --grid type=: {', '.join(names)}{''.join(hints)}")
    known = {name: [*variant_keys(name), *TRAINER_KEYS] for name in types}
    common = Settings(common)
    for key in [*grid, *common]:
        if not any(key in keys for keys in known.values()):
            raise ConfigError(common.located(key, str(unknown_setting(key, known, ALIASES))))
    points = []
    for values in itertools.product(*grid.values()):
        given = dict(zip(grid, values, strict=True))
        keys = known[str(given.get("type", types[0]))]
        varied = {key: value for key, value in given.items() if key in keys}
        settings = Settings(common, given).only(keys)
        if "hook" in grid and sae_core.registry.get(str(settings["type"])).reads.several:
            settings["hook"] = grid["hook"]  # one SAE reads them all
            varied.pop("hook", None)
        points.append(Point(settings, varied, tuple(key for key in {**common, **given} if key not in keys)))
    return points


def notes_on(points: Sequence[Point]) -> list[str]:
    """What was left out, in words: `vanilla has no k`."""
    lacking: dict[str, list[str]] = {}
    for point in points:
        for key in point.dropped:
            names = lacking.setdefault(str(point.settings["type"]), [])
            if key not in names:
                names.append(key)
    return [f"{name} has no {', '.join(keys)}: left out there" for name, keys in lacking.items()]
