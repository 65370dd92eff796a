"""Plain YAML in which a key may stand once: PyYAML's own loader keeps the last of two and says nothing."""

from __future__ import annotations

from typing import Any

import yaml


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a repeated key."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"{key.value!r} is set twice, the second time in line {line}")
            seen.add(key.value)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_MERGE = "tag:yaml.org,2002:merge"  # <<: what it brings in may be overridden
_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError, also for a key that stands twice in one mapping."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except ValueError as error:  # a date or a tagged number that is none
        raise yaml.YAMLError(str(error)) from None
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
