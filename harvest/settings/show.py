"""Every setting of a harvest with where it comes from: `sae-harvest config`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING
from typing import Any

from sae_granary.common.settings.build import values_of
from sae_granary.common.settings.declare import default_of
from sae_granary.common.settings.yaml_file import commented_yaml
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.prepare import Prepared, prepare
from sae_granary.harvest.settings.flags import Layers
from sae_granary.harvest.settings.make import (
    DECLARED,
    PARTS,
    SECTIONS,
    check_names,
    make_config,
    merged,
    plain,
    settings_of,
)


def annotated_yaml(layers: Layers, say: Callable[[str], None]) -> str:
    """Return the settings that layers make, as YAML with a comment per line; resolved if they name a model.

    No weights are loaded. Raises what `prepare` raises.
    """
    given = merged(layers)
    if given.get("model") is None:
        head, shown, derived = (["# no model was named: what depends on it is null or auto"], _undecided(given), {})
    else:
        config = make_config(given)
        head, shown = [], settings_of(config)
        left_open = {name for values in shown.values() for name, value in values.items() if value in (None, "auto", [])}
        derived = {name: value for name, value in _decided(prepare(config, say)).items() if name in left_open}

    def origin(name: str, value: Any) -> str:
        if name in derived:
            return "derived"
        return next((label for label, values in reversed(layers) if values.get(name) is not None), "default")

    sections = {
        key: {name: derived.get(name, value) for name, value in values.items()} for key, values in shown.items()
    }
    return "\n".join([*head, *commented_yaml(sections, origin)]) + "\n"


def _undecided(given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings without a model: as given, else their defaults."""
    check_names(given)
    found: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    values: dict[str, Any] = {}
    for part in (*PARTS.values(), HarvestConfig):
        values |= values_of(part, given)
    for name, spec in DECLARED.items():
        default = default_of(spec)
        found[spec.metadata["section"]][name] = plain(values.get(name, None if default is MISSING else default))
    return found


def _decided(prepared: Prepared) -> dict[str, Any]:
    """What follows from the model, the text and the machine."""
    source = prepared.source
    decided: dict[str, Any] = {
        "compute_dtype": prepared.compute_dtype,
        "device": prepared.device,
        "batch_tokens": prepared.batch_tokens,
        "out": str(prepared.config.out_path),
        "dtype": prepared.dtype,
        **{name: source.identity[name] for name in ("dataset_config", "split") if source.identity.get(name)},
    }
    if prepared.unit == "token":
        decided["ctx_len"] = prepared.rules.ctx_len
    if prepared.widths_known:
        decided["rows_per_shard"] = prepared.rows_per_shard
    if source.columns and not any("," in column for column in source.columns):
        decided["text_columns"] = list(source.columns)
    return decided
