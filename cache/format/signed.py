"""JSON files that carry their own checksum, and field-by-field parsing that raises one clear error.

The last line of the object is `"xxh3": "<XXH3-128 of every byte before that line's comma>"`, so that a truncated or
altered file is never accepted, whatever it still parses to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from sae_granary.cache.errors import CorruptCacheError, MissingFileError, NotACacheError, UnsupportedFormatError

FORMAT = "granary-activations"
VERSION = 1

_T = TypeVar("_T")
_TAIL = ',\n "xxh3": "{digest}"\n}}\n'
_TAIL_BYTES = len(_TAIL.format(digest="0" * 32))


def digest(data: bytes) -> str:
    """XXH3-128 in hexadecimal: the checksum of every file of a cache."""
    return xxhash.xxh3_128_hexdigest(data)


def dump_signed(body: Mapping[str, Any]) -> bytes:
    """The bytes of a signed JSON file; the same body gives the same bytes."""
    head = json.dumps({"format": FORMAT, "version": VERSION, **body}, indent=1, allow_nan=False)[:-2].encode()
    return head + _TAIL.format(digest=digest(head)).encode()


def load_signed(path: Path, data: bytes) -> dict[str, Any]:
    """Parse a signed JSON file, refusing another format, another version and any damage, in this order."""
    body = _parse_object(path, data)
    if body.get("format") != FORMAT:
        raise NotACacheError(
            f"{path}: format is {body.get('format')!r}, expected {FORMAT!r}: this is no activation cache"
        )
    if body.get("version") != VERSION or isinstance(body["version"], bool):
        raise UnsupportedFormatError(
            f"{path}: cache format {body.get('version')!r}; this version reads format {VERSION}: update sae-granary"
        )
    head = data[:-_TAIL_BYTES]
    if data[-_TAIL_BYTES:] != _TAIL.format(digest=digest(head)).encode():
        raise CorruptCacheError(f"{path}: the checksum in its last line does not fit: truncated or altered; restore it")
    return body


def read_bytes(path: Path) -> bytes:
    """The bytes of a small file; a missing or unreadable one is an error of the cache. Links are refused."""
    if path.is_symlink():
        raise CorruptCacheError(f"{path} is a symbolic link; files of a cache are regular files")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise MissingFileError(f"{path} is missing; restore it from a copy, or harvest again") from None
    except IsADirectoryError:
        raise CorruptCacheError(f"{path} is a folder, expected a file") from None


def _parse_object(path: Path, data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CorruptCacheError(f"{path} is not valid JSON ({error}): truncated or altered; restore it") from None
    if not isinstance(body, dict):
        raise CorruptCacheError(f"{path}: expected a JSON object, got {type(body).__name__}")
    return body


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise ValueError("a key occurs twice")
    return body


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class Fields:
    """The fields of a JSON object, typed; `where` names the object in messages."""

    def __init__(self, body: Any, where: str) -> None:
        if not isinstance(body, dict):
            raise CorruptCacheError(f"{where}: expected an object, got {body!r:.100}")
        self.body, self.where = body, where

    def get(self, name: str, kind: type[_T]) -> _T:
        """A field of exactly this type (True is no integer)."""
        value = self.body.get(name)
        if type(value) is not kind:
            raise self.error(name, value, kind.__name__)
        return value

    def optional(self, name: str, kind: type[_T]) -> _T | None:
        """A field of this type, or None where it is null or absent."""
        return None if self.body.get(name) is None else self.get(name, kind)

    def integer(self, name: str, minimum: int = 0, maximum: int = 2**64 - 1) -> int:
        """An integer in this range."""
        value = self.get(name, int)
        if not minimum <= value <= maximum:
            raise self.error(name, value, f"an integer from {minimum} to {maximum}")
        return value

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        """One of a few strings."""
        value = self.get(name, str)
        if value not in allowed:
            raise self.error(name, value, "one of " + ", ".join(allowed))
        return value

    def nested(self, name: str) -> Fields:
        """A nested object."""
        return Fields(self.body.get(name), f"{self.where}, {name}")

    def mapping(self, name: str, parse: Callable[[Fields], _T]) -> dict[str, _T]:
        """A nested object whose values are objects."""
        nested = self.nested(name)
        return {key: parse(Fields(value, f"{nested.where}, {key}")) for key, value in nested.body.items()}

    def objects(self, name: str, parse: Callable[[Fields], _T]) -> tuple[_T, ...]:
        """A list of objects."""
        return tuple(parse(Fields(item, f"{self.where}, {name}[{i}]")) for i, item in enumerate(self.get(name, list)))

    def error(self, name: str, value: object, expected: str) -> CorruptCacheError:
        """The error for a field that is not what it must be."""
        return CorruptCacheError(f"{self.where}: {name} is {value!r:.100}, expected {expected}")
