"""Write docs/parameters.md from the code: `make regenerate`. A test fails when the page is not what this writes.

It reads both stages, so it stands outside of them.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sae_granary import sae_core
from sae_granary.analyze.settings import COMMANDS, Shared
from sae_granary.common.quantities import COUNT_WORDS
from sae_granary.common.settings.coerce import describe
from sae_granary.common.settings.page import rows_of, table
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.settings.make import PARTS
from sae_granary.harvest.settings.make import SECTIONS as HARVEST_SECTIONS
from sae_granary.train.config.flags import given_settings
from sae_granary.train.config.resolve import DERIVED_OPTIONS
from sae_granary.train.config.settings import SECTIONS, TrainConfig

PAGE = Path(__file__).with_name("parameters.md")

HEAD = """# Parameters

Generated from the code by `make regenerate`; a test keeps it current.

A parameter of training has one name everywhere: `--set name=value` on the command line, `name: value` in YAML (under
its section or without one), `train_sae(name=value)` in Python. Some have a flag of their own. Stronger layers win:
defaults < the type's recommended values < YAML (`--config`) < flags and `--set`.
`sae-train config` prints the result and where each value comes from. Whole numbers take suffixes: `10k`, `5M`, `1.5B`.
A default of none means "decided from the rest", as the meaning says.
"""

HARVEST = """## Harvest (`sae-harvest run`, `plan`, `config`)

In Python these are the keywords of `sae_granary.harvest_activations(model=..., layers=6, max_tokens="5M")`; in a YAML
file (`--config`) they stand in their section or without one; `--set name=value` takes any. `sae-harvest config` prints
the result and where each value comes from.
"""

ANALYZE = """## Analyze (`sae-analyze`)

A YAML file (`--config`) may hold options at its top, for every command that has them, and a section per command
(`encode:`), which overrides them. Flags override the file. Options of every command:
"""

VARIANTS = """## Options of the types

`sae-train types NAME` prints the same. `d_in`, `n_hooks` and `d_out` follow from the cache. Those of every type:
"""


def page() -> str:
    """The whole page."""
    parts = [
        HEAD,
        *_train(),
        VARIANTS,
        _table(_options(sae_core.SAE, _FIRST_ROWS)),
        *_variants(),
        HARVEST,
        *_harvest(),
        ANALYZE,
        *_analyze(),
    ]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _train() -> Iterator[str]:
    flags = _flags()
    hints = typing.get_type_hints(TrainConfig)
    specs = [spec for spec in dataclasses.fields(TrainConfig) if spec.name != "options"]
    for section in SECTIONS:
        yield f"## Training: section `{section}`\n"
        yield _table(_row(spec, hints[spec.name], flags) for spec in specs if spec.metadata["section"] == section)


def _variants() -> Iterator[str]:
    shared = {row[0]: row for row in _options(sae_core.SAE, _FIRST_ROWS)}
    for name in sae_core.registry.names():
        cls = sae_core.registry.get(name)
        own = [row for row in _options(cls, {}) if shared.get(row[0], ("",))[1:] != row[1:]]
        own = [row for row in own if row[0].strip("`") not in _FIRST_ROWS]
        yield f"### `{name}`\n"
        yield (inspect.getdoc(cls) or "").splitlines()[0] + "\n"
        recommended = ", ".join(f"{key} {value}" for key, value in cls.recommended.items())
        if recommended:
            yield f"Recommended: {recommended}.\n"
        yield _table(own) if own else "No options of its own.\n"


_FIRST_ROWS = {  # derived: their defaults in the code stand for SAEs that are made by hand
    "d_sae": "8 * d_in",
    "dead_after_tokens": "5 % of the run",
}


def _options(cls: type[sae_core.SAE], defaults: Mapping[str, str]) -> list[tuple[str, ...]]:
    hints, flags = typing.get_type_hints(cls.Config), _flags()
    return [
        _row(spec, hints[spec.name], flags, defaults.get(spec.name))
        for spec in dataclasses.fields(cls.Config)
        if spec.name not in DERIVED_OPTIONS or spec.name in defaults
    ]


def _row(
    spec: dataclasses.Field[Any], hint: Any, flags: Mapping[str, str], default: str | None = None
) -> tuple[str, ...]:
    choices = spec.metadata.get("choices")
    kind = "one of " + ", ".join(choices) if choices else describe(hint)
    bounds = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [f"{sign} {_plain(spec.metadata[key])}" for key, sign in bounds.items() if spec.metadata[key] is not None]
    return (
        f"`{spec.name}`",
        flags.get(spec.name, ""),
        _short(kind),
        default or _default(spec),
        ", ".join(limits),
        str(spec.metadata["help"]),
    )


def _short(kind: str) -> str:
    return kind.replace(COUNT_WORDS, "whole number").replace("a number", "number")


def _default(spec: dataclasses.Field[Any]) -> str:
    if spec.default is dataclasses.MISSING:
        return "" if spec.default_factory is dataclasses.MISSING else _plain(spec.default_factory())
    return _plain(spec.default)


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value == 2**63 - 1:
        return "2^63 - 1"
    if isinstance(value, tuple):
        return ", ".join(map(_plain, value)) or "empty"
    return f"{value:g}" if isinstance(value, float) else str(value) or "empty"


def _flags() -> dict[str, str]:
    """Setting -> its flag."""
    hints = typing.get_type_hints(given_settings, include_extras=True)
    found = {name: _flag(hint) for name, hint in hints.items() if name != "return"}
    return found | {"hook": f"{found['hook']} {found['layer']}"}


def _flag(hint: Any) -> str:
    [option] = typing.get_args(hint)[1:]
    names = [option.default, *option.param_decls]  # typer takes the first name for a default
    return f"`{next(name for name in names if name.startswith('--')).split('/')[0]}`"


def _harvest() -> Iterator[str]:
    for section in HARVEST_SECTIONS:
        yield f"### Section `{section}`\n"
        parts = [rows_of(part, section) for part in (*PARTS.values(), HarvestConfig)]
        yield table(row for rows in parts for row in rows)


def _analyze() -> Iterator[str]:
    yield table(rows_of(Shared))
    for command, options in COMMANDS.items():
        yield f"### `sae-analyze {command}`\n"
        yield table(row for row in rows_of(options) if row not in rows_of(Shared))


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    head = ("name", "flag", "type", "default", "range", "meaning")
    cells = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    used = [i for i in range(len(head)) if i in (0, 5) or any(row[i] for row in cells)]
    lines = [head, tuple("---" for _ in head), *cells]
    return "\n".join("| " + " | ".join(line[i] for i in used) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
