"""Write docs/parameters.md and train/config/type_options.py from the code: `make regenerate`. A test compares them.

It reads both stages, so it stands outside of them.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_granary import sae_core
from sae_granary.analyze.settings import COMMANDS, Shared
from sae_granary.common.settings.declare import types_of
from sae_granary.common.settings.flags import default_words
from sae_granary.common.settings.page import Row, row_of, rows_of, table
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.settings.make import PARTS
from sae_granary.harvest.settings.make import SECTIONS as HARVEST_SECTIONS
from sae_granary.train.config.settings import SECTIONS, TrainConfig

PAGE = Path(__file__).with_name("parameters.md")
TYPE_OPTIONS = Path(__file__).parents[1] / "train" / "config" / "type_options.py"
OF_CACHE = ("d_in", "n_hooks", "d_out")  # options that follow from the cache
KEPT = ("help", "panel", "unit", "choices", "short", "common", "default_words")  # what a flag shows of an option

TYPE_OPTIONS_HEAD = '''"""The options of all types as flags, without torch: written by `make regenerate`."""

# ruff: noqa: E501
# fmt: off
from __future__ import annotations

from dataclasses import dataclass

from sae_granary.common.settings.declare import setting


@dataclass(frozen=True)
class TypeOptions:
    """What is not given is None; the type that is trained knows its options, and their types and ranges."""

'''

HEAD = """# Parameters

This page lists every setting with its type, default, range and meaning. It is generated from the code
(`make regenerate`). The terms are in the [glossary](concepts.md#glossary).

A setting of training has one name everywhere: `--set name=value` on the command line, `name: value` in YAML (under
its section or without one), `train_sae(name=value)` in Python. Each is a flag too (`--help-all`).
Later places override earlier ones: defaults, the type's recommended values, YAML (`--config`), flags and `--set`.
`sae-train config` prints the result and where each value comes from. Whole numbers take suffixes: `10k`, `5M`, `1.5B`.
A default of none means that the setting is off or sets no limit.
"""

HARVEST = """## Harvest (`sae-harvest run`, `plan`, `config`)

In Python these are the keywords of `sae_granary.harvest_activations(model=..., layers=6, max_tokens="5M")`; in a YAML
file (`--config`) they may be in their section or at the top level; `--set name=value` takes any.
`sae-harvest config` prints the result and where each value comes from.
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
    types = [VARIANTS, table(_options(sae_core.SAE)), *_variants()]
    parts = [HEAD, *_train(), *types, HARVEST, *_harvest(), ANALYZE, *_analyze()]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _train() -> Iterator[str]:
    for section in SECTIONS:
        yield f"## Training: section `{section}`\n"
        rows = [row for row in rows_of(TrainConfig, section) if row[0] != "`options`"]
        yield table((*row[:1], f"{row[1]} `--layer`", *row[2:]) if row[0] == "`hook`" else row for row in rows)


def _variants() -> Iterator[str]:
    shared = _options(sae_core.SAE)
    for name in sae_core.registry.names():
        cls = sae_core.registry.get(name)
        own = [row for row in _options(cls) if row not in shared]
        yield f"### `{name}`\n"
        yield (inspect.getdoc(cls) or "").splitlines()[0] + "\n"
        recommended = ", ".join(f"{key} {value}" for key, value in cls.recommended.items())
        if recommended:
            yield f"Recommended: {recommended}.\n"
        yield table(own) if own else "No options of its own.\n"


def _options(cls: type[sae_core.SAE]) -> list[Row]:
    types = types_of(cls.Config)
    return [row_of(spec, types[spec.name]) for spec in dataclasses.fields(cls.Config) if spec.name not in OF_CACHE]


def type_options() -> str:
    """The module `train.config.type_options`: a field for every option that some type has."""
    found: dict[str, dict[str, dataclasses.Field[Any]]] = {}
    switches = set()
    for name in (names := sae_core.registry.names()):
        config = sae_core.registry.get(name).Config
        for spec in dataclasses.fields(config):
            if spec.name not in OF_CACHE:
                found.setdefault(spec.name, {})[name] = spec
                switches |= {spec.name} if types_of(config)[spec.name] is bool else set()
    lines = [
        f"    {name}: {'bool' if name in switches else 'str'} | None = setting(None, {_declared(specs, names)})\n"
        for name, specs in found.items()
    ]
    return TYPE_OPTIONS_HEAD + "".join(lines)


def _declared(specs: Mapping[str, dataclasses.Field[Any]], types: Sequence[str]) -> str:
    """The keywords of an option's field: what the types that have it say alike, and which these are."""
    said = [{**spec.metadata, "default_words": default_words(spec)} for spec in specs.values()]
    alike = {key: said[0][key] for key in KEPT if all(metadata[key] == said[0][key] for metadata in said)}
    [(text, _)] = Counter(metadata["help"] for metadata in said).most_common(1)
    without = [name for name in types if name not in specs]
    some = f" Not for {', '.join(without)}." if len(without) < len(specs) else f" For {', '.join(specs)}."
    alike["help"] = f"{text}{some if without else ''}"
    alike["choices"] = tuple(dict.fromkeys(choice for metadata in said for choice in metadata["choices"] or ()))
    texts = {key: json.dumps(value) if isinstance(value, str) else repr(value) for key, value in alike.items() if value}
    return ", ".join(f"{key}={text}" for key, text in texts.items())


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


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    TYPE_OPTIONS.write_text(type_options(), encoding="utf-8")
