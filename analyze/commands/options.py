"""The options of a command: from its flags and a YAML file."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sae_granary.analyze.settings import COMMANDS, Shared
from sae_granary.common.app import takes_flags_of
from sae_granary.common.settings.declare import declared
from sae_granary.common.settings.flags import File, flag_parameter, give_flags, parameters_of

if TYPE_CHECKING:
    from sae_granary.common.settings.yaml_file import Settings

Options = TypeVar("Options", bound=Shared)
Command = Callable[..., None]

_CONFIG = flag_parameter("config", "Options in a YAML file; flags override it.", kind=File, common=True)


def takes_options(options: type[Shared]) -> Callable[[Command], Command]:
    """Decorator: the command's first argument becomes a function that returns its options; they are its flags."""

    def given(*, config: Path | None = None, **flags: Any) -> Shared:
        found = read_options(options, config, flags)
        importlib.import_module("sae_granary.analyze.source")  # seconds, for which the caller shows a line
        return found

    flags = sorted(parameters_of(options), key=lambda flag: flag.name in declared(Shared))  # its own first
    give_flags(given, [*flags, _CONFIG])
    return takes_flags_of(given)


def read_options(options: type[Options], config: Path | None, flags: Mapping[str, Any]) -> Options:
    """Return the options of a command: those of the flags that are not None, over those of a file, over the defaults.

    Raises ConfigError, with file and line where they are to blame.
    """
    from sae_granary.common.settings.build import build
    from sae_granary.common.settings.yaml_file import Settings

    below = settings_in(config, options) if config is not None else {}
    return build(options, Settings(below, {name: value for name, value in flags.items() if value is not None}))


def settings_in(path: Path, options: type[Shared]) -> Settings:
    """Return the options that a YAML file has for a command.

    An option at the top of the file is for every command that has it; one in a section is for the command of that name
    and overrides it. The sections of other commands are checked all the same. Raises ConfigError with file and line.
    """
    from sae_granary.common.settings.yaml_file import ANYWHERE, Settings, flat_settings, read_mapping

    content, source = read_mapping(path), str(path)
    homes: dict[str, list[str]] = {}
    for command, its in COMMANDS.items():
        for name in declared(its):
            homes.setdefault(name, []).append(command)
    sections = [key for key in content if str(key) in COMMANDS]
    top = _part(content, (key for key in content if key not in sections))
    found = [flat_settings(top, source, tuple(COMMANDS), dict.fromkeys(homes, ANYWHERE))]
    for section in sections:
        known = {name: section if section in commands else " or ".join(commands) for name, commands in homes.items()}
        inner = flat_settings(_part(content, [section]), source, [section], known)
        if COMMANDS[section] is options:
            found.append(inner)
    own = declared(options)
    return Settings(*(one.only(own) for one in found))


def _part(content: Mapping[Any, Any], keys: Iterable[Any]) -> Mapping[Any, Any]:
    """Some keys of a mapping, with their lines."""
    from sae_granary.common.settings.yaml_file import YamlMapping

    part = YamlMapping({key: content[key] for key in keys})
    part.lines = getattr(content, "lines", {})
    return part
