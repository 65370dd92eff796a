"""The plan of a sweep: which SAEs, under which names, in which groups. Saved once, and never decided again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_granary.cache.load.selection import Counts
from sae_granary.common import files
from sae_granary.common.finished_run import NotARunError
from sae_granary.sae_core.errors import SAEError
from sae_granary.train.config.merge import from_sections, to_sections
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.folders import PLAN, check_name

PLAN_VERSION = 1


@dataclass(frozen=True)
class Entry:
    """One SAE of a sweep."""

    config: TrainConfig  # resolved; its name is that of the folder inside the sweep's
    varied: Mapping[str, Any]  # what the grid sets

    @property
    def name(self) -> str:
        """The folder."""
        assert self.config.name is not None
        return self.config.name


@dataclass(frozen=True)
class Group:
    """SAEs that train together, and what pins their stream: row accounting and order, as in run.json."""

    entries: tuple[Entry, ...]
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a sweep does."""

    name: str
    request: str  # hash of what was asked for: another request is another sweep
    groups: tuple[Group, ...]
    notes: tuple[str, ...] = ()

    @property
    def entries(self) -> list[Entry]:
        """All SAEs, in the order of the grid within each group."""
        return [entry for group in self.groups for entry in group.entries]


def save_plan(plan: Plan, folder: Path) -> None:
    """Write sweep.json."""
    groups = [
        {
            **group.record,
            "members": [{"varied": dict(e.varied), "config": to_sections(e.config)} for e in group.entries],
        }
        for group in plan.groups
    ]
    content = {"version": PLAN_VERSION, "name": plan.name, "request": plan.request, "notes": list(plan.notes)}
    files.write_json(folder / PLAN, {**content, "groups": groups})


def load_plan(folder: Path) -> Plan:
    """Read sweep.json. Raises NotARunError."""
    path = folder / PLAN
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["version"]
    except FileNotFoundError:
        raise NotARunError(f"{folder} holds no sweep: {PLAN} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotARunError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if version != PLAN_VERSION:
        raise NotARunError(f"{path} has version {version!r}, this one reads {PLAN_VERSION}")
    try:
        groups = tuple(_group(group, str(path)) for group in content["groups"])
        return Plan(str(content["name"]), str(content["request"]), groups, tuple(map(str, content["notes"])))
    except (KeyError, TypeError, ValueError, AttributeError, SAEError) as error:
        raise NotARunError(f"{path} is damaged: {type(error).__name__}: {' '.join(str(error).split())}") from None


def _group(content: Mapping[str, Any], source: str) -> Group:
    """A group as it was saved. The names of its members stay inside the sweep's folder."""
    entries = tuple(Entry(from_sections(m["config"], source), dict(m["varied"])) for m in content["members"])
    for entry in entries:
        check_name(str(entry.config.name))
    order, counts = content["order"], Counts(**content["counts"])
    shards = [[int(index), int(n_rows)] for index, n_rows in order["shards"]]
    return Group(entries, {"counts": counts.to_json(), "order": {**order, "shards": shards}})
