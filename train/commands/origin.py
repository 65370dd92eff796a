"""Where each setting of a config comes from, shown beside it: `sae-train config`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from sae_granary import sae_core
from sae_granary.common.settings.yaml_file import commented_yaml
from sae_granary.train.config.merge import make_config, to_sections
from sae_granary.train.config.resolve import DERIVED_OPTIONS
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.data.run_data import RunData

Layers = Sequence[tuple[str, Mapping[str, Any]]]  # (where from, settings), the strongest last


def annotated_yaml(layers: Layers) -> str:
    """The config that layers of settings make, as YAML with a comment per line; resolved if they name a cache.

    Raises what opening the cache and resolving raise.
    """
    config = make_config([values for _, values in layers])
    shown = RunData.open(config).config if config.cache else _with_defaults(config)
    lines = list(commented_yaml(to_sections(shown), lambda key, value: _origin(key, value, layers, config)))
    if not config.cache:
        lines.insert(0, "# no cache was named: what depends on it is null")
        lines += [f"# {key}: the cache decides" for key in _undecided(config)]
    return "\n".join(lines) + "\n"


def _with_defaults(config: TrainConfig) -> TrainConfig:
    """With those of the variant's defaults that no cache changes."""
    specs = fields(sae_core.registry.get(config.type).Config)
    defaults = {f.name: f.default for f in specs if f.name not in DERIVED_OPTIONS}
    return replace(config, options={**defaults, **config.options})


def _undecided(config: TrainConfig) -> list[str]:
    specs = fields(sae_core.registry.get(config.type).Config)
    return [f.name for f in specs if f.name in DERIVED_OPTIONS and f.name not in config.options]


def _origin(key: str, value: Any, layers: Layers, config: TrainConfig) -> str:
    """In words: the layer that said it, or what it follows from."""
    named = [label for label, values in layers if values.get(key) is not None]
    if named and value is not None:
        return named[-1]
    if key in sae_core.registry.get(config.type).recommended:
        return f"recommended for {config.type}"
    spec = {f.name: f.default for f in fields(TrainConfig)} | {
        f.name: f.default for f in fields(sae_core.registry.get(config.type).Config)
    }
    return "default" if spec[key] == value and key not in DERIVED_OPTIONS else "derived"
