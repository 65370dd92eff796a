"""The signed JSON files of a cache, and the errors they raise."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_granary.cache.errors import CorruptCacheError, MissingFileError, NotACacheError, UnsupportedFormatError
from sae_granary.common import signed
from sae_granary.common.files import NotRegularError, read_regular

FORMAT = "granary-activations"
VERSION = 1
BLOCKS_VERSION = 3  # caches that were harvested in blocks of documents
LOAD_IN_VERSION = 4  # caches of a model whose weights were loaded with fewer bits
VERSIONS = (1, 2, BLOCKS_VERSION, LOAD_IN_VERSION)  # 2: dtypes with a scale per row

LARGE_BYTES = 4 << 20  # of a manifest: about 3,000 shards take half a second to parse
_FIRST, _NEXT, _LAST = b'\n "shards": [\n  {\n', b"\n  },\n  {\n", b"\n  }\n ]"  # of `signed.sign`
_START = re.compile(rb'\n  \{\n   "shard": (\d{1,18}),\n(?:   "block": (\d{1,18}),\n)?   "n_rows": (\d{1,18}),\n')


class Fields(signed.Fields):
    """Fields of a file of a cache."""

    damaged = CorruptCacheError

    def vector(self, name: str, dtype: str) -> Any:
        """A vector of floats, e.g. of dtype "<f8", in the form that `to_base64` gives it."""
        try:
            return np.frombuffer(base64.b64decode(self.get(name, str), validate=True), dtype=dtype)
        except (binascii.Error, ValueError):
            bits = 8 * np.dtype(dtype).itemsize
            raise CorruptCacheError(f"{self.where}: {name} is not base64 of float{bits} values") from None


def to_base64(values: npt.NDArray[Any], dtype: str) -> str:
    """A vector of floats in JSON: base64 of its bytes, so that no digit is lost."""
    return base64.b64encode(values.astype(dtype).tobytes()).decode("ascii")


def dump_signed(body: Mapping[str, Any]) -> bytes:
    """The bytes of a signed JSON file of a cache, of version 1 unless the body names another."""
    return signed.sign({"format": FORMAT, "version": VERSION, **body})


def load_signed(path: Path, data: bytes, head: bytes | None = None) -> dict[str, Any]:
    """Parse a signed JSON file, refusing another format, another version and any damage, in this order.

    Of a large one only the `head` is parsed; the checksum is that of all its bytes.
    """
    try:
        body = signed.parse_object(data if head is None else head)
    except ValueError as error:
        raise CorruptCacheError(f"{path} is {error}: truncated or altered; restore it") from None
    if body.get("format") != FORMAT:
        found = signed.short(body.get("format"))
        raise NotACacheError(f"{path}: format is {found}, expected {FORMAT!r}: this is not an activation cache")
    if body.get("version") not in VERSIONS or isinstance(body["version"], bool):
        raise UnsupportedFormatError(
            f"{path}: cache format {signed.short(body.get('version'))}; this version reads formats "
            f"{VERSIONS[0]} to {VERSIONS[-1]}: update sae-granary"
        )
    if not signed.is_intact(data):
        raise CorruptCacheError(f"{path}: the checksum in its last line does not fit: truncated or altered; restore it")
    return body


@dataclass(frozen=True, eq=False)
class RecordTexts:
    """Where the records of a manifest are in its bytes, as `dump_signed` laid them out. Shapes: S records."""

    data: bytes
    starts: npt.NDArray[np.int64]  # (S + 1,) where each record begins, one byte after the end of the one before it
    shards: npt.NDArray[np.int64]  # (S,) their numbers
    blocks: npt.NDArray[np.int64]  # (S,) 0 where the cache has none
    n_rows: npt.NDArray[np.int64]  # (S,)


def split_manifest(data: bytes) -> tuple[bytes, RecordTexts | None]:
    """A large manifest with an empty list of shards, and where their records are; a small one as it is, and None.

    Also one that is laid out in another way is returned as it is.
    """
    if len(data) < LARGE_BYTES:
        return data, None
    first, end = data.find(_FIRST), len(data) - signed.TAIL_BYTES
    if first < 0 or not data.endswith(_LAST, first, end):
        return data, None
    begin = start = first + len(_FIRST) - len(b"\n  {\n")
    end -= len(b"\n ]")
    found: list[tuple[int, ...]] = []
    while start >= 0:
        if (match := _START.match(data, start)) is None:
            return data, None
        found.append((start, *(int(group or 0) for group in match.groups())))
        after = data.find(_NEXT, match.end(), end)
        start = after + len(b"\n  },") if after >= 0 else -1
    starts, *columns = np.array(found, dtype=np.int64).T
    return data[:begin] + data[end:], RecordTexts(data, np.append(starts, end + 1), *columns)


def read_bytes(path: Path) -> bytes:
    """The bytes of a small file; a missing or unreadable one is an error of the cache. Links are refused."""
    if path.is_symlink():
        raise CorruptCacheError(f"{path} is a symbolic link; files of a cache are regular files")
    try:
        return read_regular(path)
    except FileNotFoundError:
        raise MissingFileError(f"{path} is missing; restore it from a copy, or harvest again") from None
    except NotRegularError as error:
        raise CorruptCacheError(f"{path} is {error.strerror}, expected a file") from None
