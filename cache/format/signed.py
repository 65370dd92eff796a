"""The signed JSON files of a cache, and the errors they raise."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
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
VERSIONS = (1, 2, BLOCKS_VERSION)  # 2: dtypes with a scale per row


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


def load_signed(path: Path, data: bytes) -> dict[str, Any]:
    """Parse a signed JSON file, refusing another format, another version and any damage, in this order."""
    try:
        body = signed.parse_object(data)
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
