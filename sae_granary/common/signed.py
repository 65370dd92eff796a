"""JSON files that carry their own checksum, and field-by-field parsing that raises one clear error.

The last line of the object is `"xxh3": "<XXH3-128 of every byte before that line's comma>"`, so that a truncated or
altered file is never accepted, whatever it still parses to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from sae_granary.common.errors import GranaryError, one_line
from sae_granary.common.files import read_regular, write_bytes

CHECKSUM = "xxh3"
MAX_DEPTH = 100  # of objects and lists in each other: deeper ones break what walks or prints them

_T = TypeVar("_T")
_TAIL = f',\n "{CHECKSUM}": "%s"\n}}\n'
TAIL_BYTES = len(_TAIL % ("0" * 32))


class DamagedFileError(GranaryError, ValueError):
    """A file differs from what was written."""


def digest(data: bytes | memoryview) -> str:
    """XXH3-128 in hexadecimal."""
    import xxhash  # sae_core parses files where only the standard library and torch are

    return xxhash.xxh3_128_hexdigest(data)


def sign(body: Mapping[str, Any], *, allow_nan: bool = False) -> bytes:
    """The bytes of a signed JSON file; the same body gives the same bytes."""
    head = json.dumps(body, indent=1, allow_nan=allow_nan)[:-2].encode()
    return head + (_TAIL % digest(head)).encode()


def is_intact(data: bytes) -> bool:
    """Whether the checksum in the last line of a signed file is correct."""
    return data[-TAIL_BYTES:] == (_TAIL % digest(memoryview(data)[:-TAIL_BYTES])).encode()


def write_signed(path: Path, body: Mapping[str, Any], *, allow_nan: bool = False) -> None:
    """Write a signed JSON file atomically."""
    write_bytes(path, sign(body, allow_nan=allow_nan))


def parse_object(data: bytes, *, allow_nan: bool = False) -> dict[str, Any]:
    """A JSON object of at most MAX_DEPTH levels, no key of which occurs twice. Raises ValueError."""
    constants: dict[str, Any] = {} if allow_nan else {"parse_constant": _refuse_constant}
    try:
        body = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, **constants)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(body, dict):
        raise ValueError(f"expected a JSON object, got {type(body).__name__}")
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [item for part in parts for item in part if isinstance(item, dict | list)]
        if not level:
            return body
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise ValueError("a key occurs twice")
    return body


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class Fields:
    """Typed access to the fields of a JSON object; `where` names it in messages."""

    damaged: ClassVar[type[GranaryError]] = DamagedFileError

    def __init__(self, body: Any, where: str) -> None:
        if not isinstance(body, dict):
            raise self.damaged(f"{where}: expected an object, got {short(body)}")
        self.body, self.where = body, where

    @classmethod
    def of_file(
        cls, path: Path, remedy: str, *, missing: str = "", signed_since: int | None = None, key: str = "version"
    ) -> Self:
        """The object of a JSON file, unaltered where it carries a checksum; raises `damaged`.

        It must carry one if its version (under `key`) is at least `signed_since`. `remedy` ends the message, `missing`
        is the one for a file that is not there.
        """
        try:
            data = read_regular(path)
            body = parse_object(data, allow_nan=True)
        except FileNotFoundError:
            raise cls.damaged(missing or f"{path} is missing; {remedy}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise cls.damaged(f"{path} cannot be read: {reason}; {remedy}") from None
        version = body.get(key)
        must = signed_since is not None and (not isinstance(version, int) or version >= signed_since)
        if (must or CHECKSUM in body) and not is_intact(data):
            raise cls.damaged(f"{path}: the checksum in its last line does not fit: truncated or altered; {remedy}")
        return cls(body, str(path))

    def get(self, name: str, kind: type[_T]) -> _T:
        """A field of exactly this type (True is not an integer)."""
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

    def number(self, name: str) -> float:
        """An integer or a float, NaN and Inf included."""
        return self.get(name, float) if type(self.body.get(name)) is float else float(self.get(name, int))

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        """One of a few strings."""
        value = self.get(name, str)
        if value not in allowed:
            raise self.error(name, value, "one of " + ", ".join(allowed))
        return value

    def nested(self, name: str) -> Self:
        """A nested object."""
        return type(self)(self.body.get(name), f"{self.where}, {name}")

    def mapping(self, name: str, parse: Callable[[Self], _T]) -> dict[str, _T]:
        """A nested object whose values are objects."""
        nested = self.nested(name)
        return {key: parse(type(self)(value, f"{nested.where}, {key}")) for key, value in nested.body.items()}

    def objects(self, name: str, parse: Callable[[Self], _T]) -> tuple[_T, ...]:
        """A list of objects."""
        items = enumerate(self.get(name, list))
        return tuple(parse(type(self)(item, f"{self.where}, {name}[{i}]")) for i, item in items)

    def error(self, name: str, value: object, expected: str) -> GranaryError:
        """The error for an invalid field."""
        return self.damaged(f"{self.where}: {name} is {short(value)}, expected {expected}")


def short(value: object) -> str:
    """The repr of a value, shortened to about a hundred characters."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
