"""The flags that `sae-harvest run`, `plan` and `config` share. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae_granary.common.app import takes_flags_of
from sae_granary.common.settings.flags import file_flags, give_flags, parameters_of
from sae_granary.harvest.config import HarvestConfig, TextConfig
from sae_granary.models.config import ModelConfig, TokenConfig, WhereConfig

# Where settings come from, in words, with the settings; the strongest last.
Layers = list[tuple[str, Any]]
ReadFlags = Callable[[], Layers]


def given_settings(*, config: Path | None = None, assignments: list[str] | None = None, **flags: Any) -> Layers:
    """Return the layers of settings that a command was given: its file and its flags."""
    from sae_granary.common.settings.build import parse_assignments
    from sae_granary.harvest.settings.make import read_file

    typed = {name: value for name, value in flags.items() if value is not None}
    below: Layers = [(str(config), read_file(config))] if config is not None else []
    return [*below, ("flag", typed | parse_assignments(assignments or [], typed))]


_PARTS = (ModelConfig, WhereConfig, TextConfig, TokenConfig, HarvestConfig)
give_flags(
    given_settings, [*(flag for part in _PARTS for flag in parameters_of(part)), *file_flags("the harvest", "Settings")]
)
takes_settings = takes_flags_of(given_settings)


def model_of(**flags: Any) -> dict[str, Any]:
    """Return the flags of a model that is named as an argument."""
    return {name: value for name, value in flags.items() if value is not None}


give_flags(model_of, [flag for flag in parameters_of(ModelConfig) if flag.name in ("revision", "trust_remote_code")])
takes_model_flags = takes_flags_of(model_of)
