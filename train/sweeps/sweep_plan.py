"""The plan of a sweep: which SAEs, under which names, in which groups. Saved once, and never decided again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_granary.cache.load.selection import Counts
from sae_granary.cache.read.recorded import PATHS
from sae_granary.common.errors import GranaryError
from sae_granary.common.finished_run import NotARunError, RunFields, check_stream
from sae_granary.common.signed import write_signed
from sae_granary.train.config.merge import from_sections, to_sections
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.folders import PLAN, check_name

PLAN_VERSION = 2  # since 2 with a checksum
BATCHED_VERSION = 3  # of plans whose groups are batched, which older versions would train in other numbers


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
    record: Mapping[str, Any]  # also the cache's fingerprint and paths, which sweeps of earlier versions lack


@dataclass(frozen=True)
class Plan:
    """What a sweep does."""

    name: str
    request: str  # hash of what was asked for: another request is another sweep
    groups: tuple[Group, ...]
    notes: tuple[str, ...] = ()
    batched: bool = False  # the SAEs of a group share passes: see `sweeps.batched`

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
    version = BATCHED_VERSION if plan.batched else PLAN_VERSION
    content = {"version": version, "name": plan.name, "request": plan.request, "notes": list(plan.notes)}
    write_signed(folder / PLAN, {**content, "groups": groups})


def load_plan(folder: Path) -> Plan:
    """Read sweep.json. Raises NotARunError."""
    path = folder / PLAN
    missing = f"{folder} holds no sweep: {PLAN} is missing"
    content = RunFields.of_file(path, "restore it from a copy, or start a new sweep", missing=missing, signed_since=2)
    version = content.body.get("version")
    if version not in (1, PLAN_VERSION, BATCHED_VERSION):
        raise NotARunError(f"{path} has version {version!r}, this one reads {PLAN_VERSION} and {BATCHED_VERSION}")
    try:
        groups = content.objects("groups", _group)
        notes, batched = tuple(content.get("notes", list)), version == BATCHED_VERSION
        return Plan(content.get("name", str), content.get("request", str), groups, notes, batched)
    except NotARunError:
        raise
    except (GranaryError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise NotARunError(f"{path} is damaged: {type(error).__name__}: {' '.join(str(error).split())}") from None


def _group(content: RunFields) -> Group:
    """A group as it was saved. The names of its members stay inside the sweep's folder."""
    check_stream(content)
    entries = content.objects("members", _entry)
    counts = Counts.from_json(content.get("counts", dict))
    found = {name: content.get(name, dict) for name in ("cache", PATHS) if name in content.body}
    return Group(entries, {"counts": counts.to_json(), "order": content.get("order", dict), **found})


def _entry(content: RunFields) -> Entry:
    config = from_sections(content.get("config", dict), content.where)
    check_name(str(config.name))
    return Entry(config, content.get("varied", dict))
