"""The JSON record of our SAE files: type, Config, and checksums of the tensors beside it and of the record itself.

Since format 2 the entry "sha256" holds the checksum of each tensor file and of the record without that entry, so that
an altered file is never loaded. Files of format 1 have no checksums.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sae_granary.common.errors import one_line
from sae_granary.common.signed import short
from sae_granary.sae_core import registry
from sae_granary.sae_core.base import SAE
from sae_granary.sae_core.errors import NotAnSAEError
from sae_granary.sae_core.files.disk import CHECKSUM, read_json, write_json
from sae_granary.sae_core.options import SharedConfig, as_saved

FORMAT = 2
DAMAGED = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


class Described(NamedTuple):
    """A record read from disk."""

    cls: type[SAE]
    config: SharedConfig
    checksums: Mapping[str, str]  # by file name; empty in format 1


def write_record(path: Path, type_name: str, config: SharedConfig, checksums: Mapping[str, str], **more: Any) -> Path:
    """Write the record of an SAE and return its path."""
    described = {"format": FORMAT, "type": type_name, "config": dataclasses.asdict(config), **more}
    body = json.loads(json.dumps(described))  # as it will be read
    return write_json(path, {**body, CHECKSUM: {**checksums, path.name: _checksum(body)}})


def read_record(path: Path) -> Described:
    """Read the record of an SAE. Raises NotAnSAEError for one that is damaged, or of another format."""
    record = read_json(path)
    checksums = record.pop(CHECKSUM, {})
    if record.get("format") not in (1, FORMAT):
        raise NotAnSAEError(f"{path}: format {short(record.get('format'))}, this version reads format 1 or {FORMAT}")
    if record["format"] == FORMAT or checksums:
        whole = isinstance(checksums, dict) and all(isinstance(value, str) for value in checksums.values())
        if not whole or checksums.get(path.name) != _checksum(record):
            raise NotAnSAEError(f"{path} is not what was written (its checksum differs): restore it from a copy")
    try:
        cls = registry.get(record["type"])
        return Described(cls, registry.make_config(cls, as_saved(cls.Config, record["config"])), checksums)
    except DAMAGED as error:
        raise NotAnSAEError(f"{path} is not a description of an SAE: {one_line(error)}") from error


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
