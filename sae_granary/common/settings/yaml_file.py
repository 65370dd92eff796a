"""YAML files of settings: scalars stay text, every key has its line, no key is repeated.

PyYAML follows YAML 1.1, where 007, 12:30, 1_000, 0x1F, on and 2024-01-31 are numbers, booleans and dates. Here scalars
other than null are text, which the declared type of a setting converts as it does for flags (`common.settings.coerce`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sae_granary.common.errors import ConfigError, nearest
from sae_granary.common.settings.text_file import read_text_or_pipe

_NULL, _MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"  # ~ and nothing; <<

_TEXT_TOO = [f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "timestamp")]  # also as !!int 3
MAX_VALUES = 100_000  # of a file, each counted as often as aliases repeat it: ten lines of these can make a billion
MAX_BYTES = 4 << 20
MAX_DEPTH = 100  # of lists and mappings in each other: PyYAML takes seconds for thousands

ANYWHERE, TOP = "", "top level"  # where a key that belongs to no section may be


class YamlMapping(dict[Any, Any]):
    """A mapping of a YAML text, with the line of each key, counted from 1."""

    lines: Mapping[Any, int]


class Settings(dict[str, Any]):
    """Flat settings, with the place of each that comes from a file: `c.yaml, line 3`."""

    def __init__(self, *layers: Mapping[str, Any]) -> None:
        super().__init__()
        self.places: dict[str, str] = {}
        for layer in layers:
            self.update(layer)

    def update(self, *others: Any, **more: Any) -> None:
        """Add the settings of others, with their places; the last one wins."""
        for other in (*others, more):
            self.places = {key: place for key, place in self.places.items() if key not in other}
            self.places |= getattr(other, "places", {})
            super().update(other)

    def only(self, names: Container[str]) -> Settings:
        """Return those of these names."""
        kept = Settings({name: value for name, value in self.items() if name in names})
        kept.places = self.places
        return kept

    def located(self, key: str, problem: str) -> str:
        """A message on a setting, after the place of the setting if it has one."""
        return f"{self.places[key]}: {problem}" if key in self.places else problem


class RepeatedKeyError(yaml.YAMLError):
    """A key is repeated in one mapping."""

    def __init__(self, key: str, first: int, second: int) -> None:
        super().__init__(f"{key!r} is set twice, in lines {first} and {second}")


class _TextLoader(yaml.SafeLoader):
    """SafeLoader that reads scalars as text and refuses a repeated key, too many values and too much depth."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem=f"lists and mappings are nested more than {MAX_DEPTH} deep", problem_mark=mark
            )
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        if _count(node, {}) > MAX_VALUES:
            raise yaml.YAMLError(f"its aliases (*name) repeat more than {MAX_VALUES:,} values; write out what you need")
        return super().construct_document(node)


def _count(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Values of a node with its aliases written out; what holds itself is refused elsewhere."""
    if node not in known:
        known[node] = 1
        if isinstance(node, yaml.CollectionNode):
            pairs = isinstance(node, yaml.MappingNode)
            parts = [part for pair in node.value for part in pair] if pairs else node.value
            known[node] += sum(_count(part, known) for part in parts)
    return known[node]


def _mapping(loader: _TextLoader, node: yaml.MappingNode) -> YamlMapping:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:  # what << brings in may be overridden
            line = key.start_mark.line + 1
            if key.value in lines:
                raise RepeatedKeyError(key.value, lines[key.value], line)
            lines[key.value] = line
    loader.flatten_mapping(node)
    made = YamlMapping(loader.construct_mapping(node, deep=True))
    made.lines = {_text(key): key.start_mark.line + 1 for key, _ in node.value if isinstance(key, yaml.ScalarNode)}
    return made


def _text(key: yaml.ScalarNode) -> str:
    """A key as `str` shows it: `~` is None."""
    return str(None) if key.tag == _NULL else str(key.value)


def _scalar(loader: _TextLoader, node: yaml.ScalarNode) -> Any:
    return loader.construct_scalar(node)


_TextLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in (_NULL, _MERGE)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_TextLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
for _tag in _TEXT_TOO:
    _TextLoader.add_constructor(_tag, _scalar)


def load_yaml(text: str) -> Any:
    """Return the value of a YAML text; its mappings are YamlMappings.

    Raises yaml.YAMLError, also for a key that is repeated in one mapping.
    """
    try:
        return yaml.load(text, Loader=_TextLoader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def _where_and_what(error: yaml.YAMLError) -> str:
    """The line of an error and the problem, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {' '.join(str(error.problem).split())}"
    return " ".join(str(error).split())


def read_mapping(path: str | Path) -> Mapping[Any, Any]:
    """Return the mapping that a YAML file holds; an empty one for an empty file. Raises ConfigError."""
    try:
        text = read_text_or_pipe(Path(path), MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    try:
        content = load_yaml(text)
    except RepeatedKeyError as error:
        raise ConfigError(f"{path}: {error}; remove one") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not plain YAML: {_where_and_what(error)}") from None
    if not isinstance(content, Mapping | None):
        raise ConfigError(f"config file {path}: expected keys and values, got {type(content).__name__}")
    return content or {}


def flat_settings(
    content: Mapping[Any, Any],
    source: str,
    sections: Sequence[str],
    known: Mapping[str, str] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Settings:
    """Return the settings of a file, which are in a section or beside the sections, by name.

    `known` has the section of every setting, ANYWHERE or TOP; without it (files that a run saved, perhaps of an older
    version) unknown settings and sections of others pass. `aliases` are other names of sections.
    Raises ConfigError with file, line and the nearest name: for an unknown setting or section, a setting that is given
    twice or in another section, and a section that holds no mapping.
    """
    flat = Settings()
    for section, name, value, place in _entries(content, source, sections, known, aliases or {}):
        if name in flat:
            first = flat.places[name].removeprefix(f"{source}, ")
            raise ConfigError(f"{place}: {name!r} is set twice, first in {first}; remove one")
        if known is not None:
            _check_place(section, name, place, known)
        flat[name] = value
        flat.places[name] = place
    return flat


def _entries(
    content: Mapping[Any, Any],
    source: str,
    sections: Sequence[str],
    known: Mapping[str, str] | None,
    aliases: Mapping[str, str],
) -> Iterator[tuple[str, str, Any, str]]:
    """Section, name, value and place of each setting."""
    for key, value in content.items():
        name, place = aliases.get(str(key), str(key)), _place(source, content, key)
        if name in sections and isinstance(value, Mapping | None):
            for inner, inner_value in (value or {}).items():
                yield name, _name(inner), inner_value, _place(source, value or {}, inner)
        elif name in sections and (known is None or _name(key) not in known):
            raise ConfigError(f"{place}: {name} is a section, which holds settings, got {name}: {value!r}")
        elif known is not None and isinstance(value, Mapping) and _name(key) not in known:
            listed = ", ".join(sections)
            raise ConfigError(f"{place}: unknown section {key!r}{nearest(_name(key), sections)} (sections: {listed})")
        else:
            yield TOP, _name(key), value, place


def _check_place(section: str, name: str, place: str, known: Mapping[str, str]) -> None:
    if name not in known:
        raise ConfigError(f"{place}: unknown setting {name!r}{nearest(name, known)}")
    if section != TOP and known[name] not in (ANYWHERE, section):
        belongs = "beside the sections" if known[name] == TOP else f"in the section {known[name]}"
        raise ConfigError(f"{place}: {name!r} is in the section {section}, but belongs {belongs}")


def _name(key: Any) -> str:
    return str(key).replace("-", "_")


def _place(source: str, mapping: Mapping[Any, Any], key: Any) -> str:
    line = getattr(mapping, "lines", {}).get(str(key))
    return source if line is None else f"{source}, line {line}"


def commented_yaml(sections: Mapping[str, Mapping[str, Any]], comment: Callable[[str, Any], str]) -> Iterator[str]:
    """Yield the lines of a YAML file of settings by section, each with a comment: where its value comes from."""
    for section, values in sections.items():
        yield f"{section}:"
        for key, value in values.items():
            text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=2**20)
            text = text.removesuffix("\n").removesuffix("\n...")
            yield f"  {key}: {text}  # {comment(key, value)}"
