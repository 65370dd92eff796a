"""How layers of settings become one config.

Precedence: defaults < the variant's recommended values < YAML < flags and `--set`. `None` means "decided from the cache
and the run's length" (`train.config.resolve`); the resolved config holds no undecided value and is what a run saves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from sae_granary import sae_core
from sae_granary.cache.remote.store import is_url
from sae_granary.common.errors import ConfigError, nearest
from sae_granary.common.files import user_path
from sae_granary.common.settings.coerce import coerce, typed_value
from sae_granary.common.settings.declare import kinds_of
from sae_granary.common.settings.yaml_file import ANYWHERE, TOP, Settings, flat_settings, read_mapping
from sae_granary.sae_core.options import as_saved
from sae_granary.train.config.settings import SECTIONS, TrainConfig

# Sections of a YAML file may also be called as other trainers call them.
_SECTION_ALIASES = {"wandb": "logging"}

_PATHS = ("cache", "runs_dir", "init_from")

# What a saved config must say.
_DECIDED = ("cache", "name", "hook", "device", "compute_dtype", "shuffle_seed", "init_seed", "steps", "lr")

# Words of other tools and neighbors of a setting -> what a type may have instead of it.
_INSTEAD = {
    **dict.fromkeys(("k", "l0", "l0_target", "l0_coef", "l1_coef"), ("k", "l0_target", "l0_coef", "l1_coef")),
    **dict.fromkeys(("layer", "layers", "hooks"), ("hook",)),
}

# Ways to say one thing: one in a higher layer replaces the others in lower layers.
_ONE_OF = (("tokens", "steps", "epochs"), ("d_sae", "expansion_factor"))

_SPECS = {spec.name: spec for spec in fields(TrainConfig) if spec.name != "options"}
_KINDS = kinds_of(TrainConfig)
TRAINER_KEYS = tuple(_SPECS)


def variant_keys(type_name: str) -> dict[str, Any]:
    """Options of a variant with their annotations. d_in follows from the cache; a saved config repeats it."""
    return kinds_of(sae_core.registry.get(type_name).Config)


def make_config(layers: Sequence[Mapping[str, Any]]) -> TrainConfig:
    """Merge layers of flat settings, the last one wins; below them are the variant's recommended values.

    Raises ConfigError for an unknown key (with the nearest known one) or a value that does not fit.
    """
    given = merge_layers(layers)
    type_name, known = given.get("type"), ", ".join(sae_core.registry.names())
    if not type_name:
        raise ConfigError(f"no type of SAE was given; choose one with --type: {known}")
    if several := sweep_of("type", type_name):
        raise ConfigError(f"type={type_name!r}: expected one of {known}{several}")
    try:
        cls = sae_core.registry.get(str(type_name))
    except sae_core.SAEError as error:
        raise type(error)(given.located("type", str(error))) from None
    specs = {spec.name: spec for spec in fields(cls.Config)} | _SPECS
    kinds = variant_keys(str(type_name)) | _KINDS
    typed: dict[str, Any] = {}
    for key, value in {**cls.recommended, **given}.items():
        try:
            if key not in specs:
                raise unknown_setting(key, {str(type_name): variant_keys(str(type_name))})
            typed[key] = typed_value(specs[key], value, kinds[key], sweep_of)
            if key in _PATHS and (typed[key] or key == "runs_dir") and not (key == "cache" and is_url(typed[key])):
                typed[key] = str(user_path(key, typed[key]))
        except ConfigError as error:
            raise ConfigError(given.located(key, str(error))) from None
    settings = {key: value for key, value in typed.items() if key in TRAINER_KEYS}
    chosen = {key: value for key, value in typed.items() if key not in TRAINER_KEYS}
    _type_nested(cls.Config, chosen)
    if "d_sae" in chosen and settings.get("expansion_factor") is not None:
        factor = settings["expansion_factor"]
        raise ConfigError(f"d_sae={chosen['d_sae']} and expansion_factor={factor}: give one of them")
    return TrainConfig(**settings, options=chosen)


def _type_nested(config: type[Any], chosen: dict[str, Any]) -> None:
    """Convert mappings that hold options of another type, which one of the chosen options names."""
    for spec in fields(config):
        named_by = spec.metadata.get("options_of")
        if named_by and chosen.get(spec.name):
            default = next(other.default for other in fields(config) if other.name == named_by)
            known = variant_keys(chosen.get(named_by, default))
            nested = {key: coerce(key, v, known.get(key, Any)) for key, v in chosen[spec.name].items()}
            chosen[spec.name] = nested


def unknown_setting(key: str, known: Mapping[str, Iterable[str]], more: Iterable[str] = ()) -> ConfigError:
    """The error for a key that no type of `known` (name -> its options) has, with what it may have meant."""
    options = list(dict.fromkeys(name for names in known.values() for name in names))
    there = [name for name in _INSTEAD.get(key, ()) if name in (*options, *TRAINER_KEYS)]
    hint = f"; here use {' or '.join(there)}" if there else nearest(key, [*options, *TRAINER_KEYS, *more])
    types = f"type {next(iter(known))}" if len(known) == 1 else f"any of {', '.join(known)}"
    own = ", ".join(name for name in options if name not in ("d_in", *TRAINER_KEYS))
    return ConfigError(f"unknown setting {key!r} for {types}{hint} (its options: {own})")


def sweep_of(key: str, value: Any) -> str:
    """The end of a message about several values where one belongs: the sweep with an SAE for each. Empty for one."""
    values = value.split(",") if isinstance(value, str) else value
    if isinstance(values, list | tuple) and len(values) > 1 and all(not isinstance(v, list | Mapping) for v in values):
        listed = ",".join(str(v).strip() for v in values)
        return f"; for an SAE with each of several values: sae-train sweep --grid {key}={listed}"
    return ""


def merge_layers(layers: Sequence[Mapping[str, Any]]) -> Settings:
    """Flat settings of all layers, the last one wins. Nothing is checked."""
    given = Settings()
    for layer in layers:
        for group in _ONE_OF:
            if any(layer.get(key) is not None for key in group):
                for key in group:
                    given.pop(key, None)
        given.update(layer)
    return given


def read_yaml(path: str | Path) -> Settings:
    """Flat settings of a YAML file, with or without sections (run, model, training, data, logging).

    Raises ConfigError with file and line: see `common.settings.yaml_file.flat_settings`.
    """
    known = _known_in_files()
    settings = flat_settings(read_mapping(path), str(path), SECTIONS, known, _SECTION_ALIASES)
    if isinstance(settings.get("grid"), Mapping):
        settings["grid"] = flat_settings(settings["grid"], str(path), (), known)
    return settings


def _known_in_files() -> dict[str, str]:
    """The section of every setting of a file, those of all types included."""
    known = {key: "model" for name in sae_core.registry.names() for key in variant_keys(name)}
    known = dict.fromkeys([*_INSTEAD, "layer_stride"], ANYWHERE) | known
    return known | {name: spec.metadata["section"] for name, spec in _SPECS.items()} | {"grid": TOP}


def to_sections(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """The config as plain values by section, for YAML and JSON; `from_sections` reads it back."""
    out: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for spec in fields(TrainConfig):
        if spec.name in TRAINER_KEYS:
            out[spec.metadata["section"]][spec.name] = _plain(getattr(config, spec.name))
    out["model"].update({key: _plain(value) for key, value in config.options.items()})
    return out


def to_flat(config: TrainConfig) -> dict[str, Any]:
    """The config as plain values by name."""
    return {key: value for values in to_sections(config).values() for key, value in values.items()}


def from_sections(content: Mapping[str, Any], source: str) -> TrainConfig:
    """Read a saved config back. Raises ConfigError or SAEError, also for one that was not resolved."""
    flat: dict[str, Any] = flat_settings(content, source, SECTIONS, aliases=_SECTION_ALIASES)
    if flat.get("type"):
        flat = as_saved(sae_core.registry.get(str(flat["type"])).Config, flat)
    config = make_config([flat])
    for name in _DECIDED:
        if getattr(config, name) in (None, (), "", "auto"):
            raise ConfigError(f"{source} leaves {name} undecided: expected the settings of a run as it saved them")
    sae_core.make_config(sae_core.registry.get(config.type), config.options)  # raises for an option that is missing
    return config


def differing(saved: TrainConfig, now: TrainConfig) -> list[str]:
    """The settings in which two configs differ: `k=32, now 64`."""
    before, after = to_flat(saved), to_flat(now)
    keys = list(dict.fromkeys([*before, *after]))
    return [f"{k}={before.get(k)}, now {after.get(k)}" for k in keys if before.get(k) != after.get(k)]


def to_yaml(config: TrainConfig) -> str:
    """The config as YAML text."""
    text: str = yaml.safe_dump(to_sections(config), sort_keys=False, allow_unicode=True)
    return text


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
