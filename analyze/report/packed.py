"""Named arrays as one base64 text inside the page: typed, deflated, decoded when needed.

    base64(deflate-raw(
        header length (uint32)  header (JSON, padded with spaces to 8 bytes)  arrays, each padded to 8 bytes
    ))

The header is a list of [name, type, number of entries]; data.js reads the same format. All numbers are little-endian.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

TYPES = ("u1", "i1", "u2", "u4", "f4")  # that data.js knows
ALIGNMENT = 8
LEVEL = 6


def pack(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Arrays of the TYPES, flattened, as one text."""
    header, parts = [], []
    for name, array in arrays.items():
        kind = array.dtype.str[1:]
        if kind not in TYPES:
            raise TypeError(f"{name} is of type {array.dtype}, expected one of {', '.join(TYPES)}")
        header.append([name, kind, array.size])
        parts.append(_padded(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes(), b"\0"))
    head = _padded(json.dumps(header, separators=(",", ":")).encode() + b" " * 4, b" ")[:-4]  # 4 go to its length
    return deflated(struct.pack("<I", len(head)) + head + b"".join(parts))


def pack_json(value: Any) -> str:
    """A JSON value as one text."""
    return deflated(json.dumps(value, separators=(",", ":")).encode())


def deflated(data: bytes) -> str:
    """Raw deflate, in base64."""
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, -15)
    return base64.b64encode(packer.compress(data) + packer.flush()).decode("ascii")


def _padded(data: bytes, filler: bytes) -> bytes:
    return data + filler * (-len(data) % ALIGNMENT)
