"""From the points of a grid to the plan of a sweep.

points -> configs resolved against the cache -> equal ones once -> names -> groups of one stream that fit the memory
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from sae_granary.cache.load.selection import Counts
from sae_granary.common.errors import ConfigError
from sae_granary.common.files import free_bytes
from sae_granary.common.quantities import byte_size
from sae_granary.train.config.merge import make_config, to_sections
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.data.cache_of_run import open_cache_of
from sae_granary.train.data.run_data import RunData
from sae_granary.train.memory.capacity import needed_disk
from sae_granary.train.sweeps.grid import Point, notes_on
from sae_granary.train.sweeps.grouping import groups_of
from sae_granary.train.sweeps.sweep_plan import Entry, Plan

# What the name of a run tells anyway (`resolve.default_name`).
NAMED = ("type", "d_sae", "expansion_factor", "k", "init_seed", "shuffle_seed", "hook")


def request_of(points: Sequence[Point]) -> str:
    """A hash of the typed settings of all points. Raises ConfigError for a value that does not fit."""
    asked = []
    for point in points:
        config = make_config([point.settings])
        known = {**{k: getattr(config, k) for k in point.settings if hasattr(config, k)}, **config.options}
        asked.append({k: repr(known[k]) for k in sorted(point.settings)})
    return xxhash.xxh3_64_hexdigest(json.dumps(asked, sort_keys=True).encode())


def default_sweep_name(points: Sequence[Point], request: str) -> str:
    """<cache>_sweep_<hash>: the same command names the same folder."""
    name = f"{Path(str(points[0].settings.get('cache', ''))).name}_sweep_{request[:8]}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def make_plan(points: Sequence[Point], folder: Path, request: str, *, batched: bool = False) -> Plan:
    """Resolve every point against the cache and group them.

    Raises what `RunData.open` raises, and ConfigError for what does not fit.
    """
    first = make_config([{**points[0].settings, "name": None}])
    opened, known = open_cache_of(first), dict[Any, Counts]()
    members: dict[str, tuple[RunData, Entry]] = {}
    equal = 0
    for point in points:
        data = RunData.open(make_config([{**point.settings, "name": None}]), opened, known)
        if data.config.shard_latents:
            raise ConfigError("--shard-latents is for run: a sweep divides its SAEs over the ranks, not their latents")
        config = replace(data.config, name=_name(data.config, point.varied), runs_dir=str(folder))
        content = json.dumps(to_sections(replace(config, name=None)))
        equal += content in members
        members.setdefault(content, (replace(data, config=config), Entry(config, dict(point.varied))))
    notes = notes_on(points)
    if equal:
        notes.append(f"{equal} of {len(points)} points equal others: {len(members)} SAEs are trained")
    planned = _unique_names(list(members.values()))
    groups, more = groups_of(planned, batched=batched)
    _check_disk([entry.config for _, entry in planned])
    return Plan(folder.name, request, tuple(groups), (*notes, *more), batched)


def _name(config: TrainConfig, varied: Mapping[str, Any]) -> str:
    parts = [str(config.name)]
    parts += [f"{key}{_text(value)}" for key, value in varied.items() if key not in NAMED]
    return re.sub(r"[^A-Za-z0-9._=+-]+", "-", "_".join(parts)).strip("-")


def _text(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _unique_names(members: Sequence[tuple[RunData, Entry]]) -> list[tuple[RunData, Entry]]:
    """Names that differ, by a number behind those that do not."""
    seen: dict[str, int] = {}
    out = []
    for data, entry in members:
        seen[entry.name] = n = seen.get(entry.name, 0) + 1
        config = entry.config if n == 1 else replace(entry.config, name=f"{entry.name}-{n}")
        out.append((replace(data, config=config), replace(entry, config=config)))
    return out


def _check_disk(configs: Sequence[TrainConfig]) -> None:
    runs_dir = Path(configs[0].runs_dir)
    needed, free = sum(map(needed_disk, configs)), free_bytes(runs_dir)
    if needed > free:
        fitting = free * len(configs) // needed
        raise ConfigError(
            f"{runs_dir} has {byte_size(free)} free, the checkpoints of {len(configs)} SAEs need about "
            f"{byte_size(needed)}: about {fitting} SAEs would fit; "
            "free space, lower --keep, or choose another --runs-dir"
        )
