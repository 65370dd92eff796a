"""The flags of every command that takes settings: those of `TrainConfig` and of the types, and what sets several.

Imports nothing heavy.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_granary.common.app import takes_flags_of
from sae_granary.common.errors import ConfigError
from sae_granary.common.settings.flags import Texts, file_flags, flag_parameter, give_flags, parameters_of
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.config.type_options import TypeOptions


@dataclass(frozen=True)
class Given:
    """What was typed: a YAML file, and on top of it flags and `--set`.

    `hooks` are those of --hook and --layer, or of `layers:` in the file, where `all` may stand;
    `train.config.hook_layers` finds them in the cache.
    """

    file: tuple[str, Mapping[str, Any]] | None  # its name and its settings
    flags: Mapping[str, Any]
    hooks: tuple[str, ...] = ()
    layer_stride: str | None = None
    hooks_of_file: bool = False

    def layers(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Layers of settings with where they come from, the strongest last."""
        return [*([self.file] if self.file else []), ("flag", self.flags)]


def given_settings(
    *,
    config: Path | None = None,
    hook: list[str] | None = None,
    layer: list[str] | None = None,
    layer_stride: str | None = None,
    assignments: list[str] | None = None,
    **settings: Any,
) -> Given:
    """What the flags of a command say."""
    from sae_granary.common.settings.build import parse_assignments
    from sae_granary.train.config.merge import read_yaml

    flags = {key: value for key, value in settings.items() if value is not None}
    below = read_yaml(config) if config else {}
    in_file = [below.pop(name, None) for name in ("layer", "layers")]
    stride = below.pop("layer_stride", None)
    hooks = _hook_points("--hook", hook) + _hook_points("--layers", layer)
    layers = [name for values in in_file for name in _hook_points("layers:", values)]
    of_file = not hooks and bool(layers)
    if of_file:
        hooks = _hook_points("hook:", below.get("hook")) + layers
    file = (str(config), below) if config else None
    flags |= parse_assignments(assignments or [], flags)
    return Given(file, flags, tuple(hooks), layer_stride or (None if stride is None else str(stride)), of_file)


def _hook_points(option: str, values: list[str] | str | None) -> list[str]:
    """Names with commas, split; a number is that layer. Raises ConfigError for an empty one."""
    texts = [] if values is None else [str(value) for value in (values if isinstance(values, list) else [values])]
    parts = [part.strip() for text in texts for part in text.split(",")]
    if "" in parts:
        example = "a hook point of the cache" if "hook" in option else "6, or 2,4,6, or all"
        raise ConfigError(f"{option} {','.join(texts)!r}: a name is empty; expected {example}")
    return [_layer(part) if "layer" in option else part for part in parts]


def _layer(text: str) -> str:
    number = text.lstrip("0") or "0"  # of any length, which int() does not take
    return f"layer_{number}" if text.isascii() and text.isdecimal() else text


def _parameters() -> Iterator[inspect.Parameter]:
    """Those of the settings, and beside some of them what is no setting."""
    yield from file_flags("the trainer or the type", "Run")
    for parameter in parameters_of(TrainConfig, without=("options",)):
        yield parameter
        if parameter.name == "hook":
            yield flag_parameter(
                "layer",
                "Train one SAE per layer (6, or 2,4,6, or all) in a single pass; a type that reads several hook points "
                "reads these layers.",
                kind=Texts,
                names=("--layer", "--layers", "-l"),
                panel="Run",
                common=True,
            )
            yield flag_parameter("layer_stride", "Keep every n-th selected layer. (default: 1)", panel="Run")
    yield from parameters_of(TypeOptions)


give_flags(given_settings, list(_parameters()))

takes_settings = takes_flags_of(given_settings)
