"""The files of a run as published: local paths are reduced to their last component."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from sae_granary.common.finished_run import CONFIG, SAE_FILES, SAE_RECORD, SUMMARY, read_metadata, read_summary
from sae_granary.common.signed import CHECKSUM, write_signed
from sae_granary.sae_core.files.disk import read_json, write_json
from sae_granary.sae_core.files.record import read_record, write_record

FILES = (*SAE_FILES, CONFIG, SUMMARY)
_LOCAL = re.compile(r"(/|~[/\\]?|\.\.?[/\\]|[A-Za-z]:[/\\]|\\\\)[^/\\]")
_TOKENS = ("exclude_tokens",)  # settings whose texts may look like paths


def public(value: object) -> object:
    """A value as published: a local path is reduced to its last component."""
    return _last_part(value) if isinstance(value, str) and _LOCAL.match(value) else value


def stage(run: Path, folder: Path) -> None:
    """Put what is published of a run into an empty folder: links to its weights, copies of what may name local paths.

    The copies have checksums of their own, so that the folder loads. Raises NotARunError and SAEError for damage.
    """
    config = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8")) if (run / CONFIG).is_file() else {}
    paths = sorted({*_paths(config), *_paths(read_metadata(run))}, key=len, reverse=True)
    for name in (name for name in FILES if (run / name).is_file()):
        source, target = run / name, folder / name
        if name == CONFIG:
            text = yaml.safe_dump(_without(config, paths), sort_keys=False, allow_unicode=True)
            target.write_text(text, encoding="utf-8")
        elif name == SUMMARY:
            summary = {key: value for key, value in read_summary(run).items() if key != CHECKSUM}
            write_signed(target, _without(summary, paths), allow_nan=True)
        elif name == SAE_RECORD:
            cls, options, checksums = read_record(source)
            others = {file: checksum for file, checksum in checksums.items() if file != name}
            write_record(target, cls.type_name, options, others, metadata=_without(read_metadata(run), paths))
        elif source.suffix == ".json":
            write_json(target, _without(read_json(source), paths))
        else:
            target.symlink_to(source.resolve())


def _paths(value: Any) -> Iterator[str]:
    """All local paths in nested mappings and lists."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in _TOKENS:
                yield from _paths(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _paths(inner)
    elif isinstance(value, str) and _LOCAL.match(value):
        yield value


def _without(value: Any, paths: list[str]) -> Any:
    """Nested values with the last part of each local path, also where a text names one of `paths`."""
    if isinstance(value, Mapping):
        return {key: inner if key in _TOKENS else _without(inner, paths) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without(inner, paths) for inner in value]
    if not isinstance(value, str) or _LOCAL.match(value):
        return public(value)
    for path in paths:
        value = value.replace(path, _last_part(path))
    return value


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
