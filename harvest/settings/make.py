"""The settings of a harvest by name, of files, flags and Python, and the config that they make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_granary.common.errors import ConfigError, nearest
from sae_granary.common.settings.build import values_of
from sae_granary.common.settings.declare import declared
from sae_granary.common.settings.yaml_file import Settings, flat_settings, read_mapping
from sae_granary.harvest.config import HarvestConfig, TextConfig
from sae_granary.models.config import ModelConfig, TokenConfig, WhereConfig

PARTS: Mapping[str, type[Any]] = {"model": ModelConfig, "where": WhereConfig, "text": TextConfig, "tokens": TokenConfig}
DECLARED = declared(*PARTS.values(), HarvestConfig)
SECTIONS = tuple(dict.fromkeys(spec.metadata["section"] for spec in DECLARED.values()))


def read_file(path: Path) -> Settings:
    """Return the settings of a YAML file, in sections or without. Raises ConfigError."""
    places = {name: spec.metadata["section"] for name, spec in DECLARED.items()}
    return flat_settings(read_mapping(path), str(path), SECTIONS, places)


def merged(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Settings:
    """Return the settings of all layers (where from, settings); the last one wins."""
    return Settings(*(values for _, values in layers))


def check_names(given: Iterable[str]) -> None:
    """Raise ConfigError for a setting that a harvest has not."""
    for name in given:
        if name not in DECLARED:
            hint = nearest(name, DECLARED)
            raise ConfigError(f"unknown setting {name!r} of a harvest{hint}; `sae-harvest config` prints them all")


def make_config(given: Mapping[str, Any]) -> HarvestConfig:
    """Return the config of one harvest; None means the default.

    Raises ConfigError for a setting that is unknown, missing or out of range.
    """
    check_names(given)
    if given.get("model") is None:
        raise ConfigError("no model was given: name a hub id, a local folder, or demo (--model)")
    values = {part: values_of(part, given) for part in (*PARTS.values(), HarvestConfig)}
    parts = {name: part(**values[part]) for name, part in PARTS.items()}
    return HarvestConfig(**parts, **values[HarvestConfig])


def settings_of(config: HarvestConfig) -> dict[str, dict[str, Any]]:
    """Return the settings of a config by section, as plain values."""
    found: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for part in (*(getattr(config, name) for name in PARTS), config):
        for name in declared(type(part)):
            found[DECLARED[name].metadata["section"]][name] = plain(getattr(part, name))
    return found


def plain(value: Any) -> Any:
    """Return a value as YAML has it."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
