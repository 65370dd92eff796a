"""YAML whose scalars stay text, except null, and in which a key may stand once.

PyYAML follows YAML 1.1, where 007, 12:30, 1_000, 0x1F, on and 2024-01-31 are numbers, booleans and dates. Here the
declared type of a setting converts its text, as for flags (`train.config.coerce`).
"""

from __future__ import annotations

from typing import Any

import yaml

_NULL, _MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"  # ~ and nothing; <<


class _TextLoader(yaml.SafeLoader):
    """SafeLoader that reads scalars as text and refuses a repeated key."""


def _mapping(loader: _TextLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:  # what << brings in may be overridden
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"{key.value!r} is set twice, the second time in line {line}")
            seen.add(key.value)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_TextLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in (_NULL, _MERGE)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_TextLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError, also for a key that stands twice in one mapping."""
    try:
        return yaml.load(text, Loader=_TextLoader)
    except ValueError as error:  # a tagged number or date that is none
        raise yaml.YAMLError(str(error)) from None
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
