"""Vectors in .npy, .npz and .safetensors: arrays (N, D), beside them arrays (N,) of ids, texts and other values.

Nothing is unpickled: arrays of objects are refused.
"""

from __future__ import annotations

import json
import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from sae_granary.cache.format.storage import Array
from sae_granary.cache.vectors.fields import Field, VectorFile, VectorFileError, batch_rows
from sae_granary.common.files import open_regular

_SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16"}
_SAFETENSORS |= {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"}
# What numpy and zipfile raise for damaged files and for archives they do not read.
_DAMAGE = (
    *(ValueError, OSError, EOFError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError),
)
_MAX_HEADER = 100 << 20  # bytes, as safetensors itself allows
_NPY = "vectors"  # the one array of an .npy file has no name


@dataclass(frozen=True)
class _Array:
    """An array on disk; `read(start, n_rows)` yields its rows from one on."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[int, int], Iterator[Array]]

    def field(self, name: str) -> Field:
        is_vector = len(self.shape) == 2 and self.shape[1] > 0 and _is_number(self.dtype)
        kind = "objects" if self.dtype.hasobject else self.dtype.name
        return Field(name, is_vector, f"{kind} {self.shape}", self.shape[1] if is_vector else None)


class ArrayFile(VectorFile):
    """A file of named arrays with one length."""

    def __init__(self, path: Path, arrays: dict[str, _Array]) -> None:
        super().__init__(path)
        self._arrays = arrays

    @property
    def fields(self) -> dict[str, Field]:
        """Its arrays."""
        return {name: array.field(name) for name, array in self._arrays.items()}

    def n_rows(self, name: str) -> int | None:
        """The length of an array."""
        return self._arrays[name].shape[0]

    def width(self, name: str) -> int:
        """Numbers in a vector."""
        return self._arrays[name].shape[1]

    def batches(self, names: Sequence[str], width: int, start: int) -> Iterator[dict[str, Any]]:
        """Rows of several arrays together."""
        arrays = [self._arrays[name] for name in names]
        lengths = {name: array.shape[:1] for name, array in zip(names, arrays, strict=True)}
        for name, array in zip(names, arrays, strict=True):
            if array.shape[:1] != arrays[0].shape[:1]:
                raise self.error(
                    f"{name} has {array.shape[0] if array.shape else 1} rows, {names[0]} {lengths[names[0]][0]}"
                )
            if array.dtype.hasobject:
                raise self.error(f"{name} is an array of objects, which is not read; save it as numbers or strings")
        n = batch_rows(width * arrays[0].dtype.itemsize)
        for parts in zip(*(array.read(start, n) for array in arrays), strict=True):
            yield {
                name: part if part.ndim == 2 else [_text(value) for value in part.tolist()]
                for name, part in zip(names, parts, strict=True)
            }


def open_npy(path: Path) -> VectorFile:
    """An .npy file, mapped."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except _DAMAGE as error:
        raise VectorFileError(f"{path}: {_damage(error)}") from None
    if not isinstance(array, np.ndarray):
        raise VectorFileError(f"{path} is an .npz archive: use --format npz")
    return _checked(path, {_NPY: _mapped(array)})


def open_npz(path: Path) -> VectorFile:
    """An .npz file: its arrays are read in pieces, whether they are compressed or not."""
    try:
        archive = zipfile.ZipFile(path)
        arrays = {}
        for name in archive.namelist():
            if not name.endswith(".npy"):
                continue
            with archive.open(name) as file:
                shape, fortran, dtype = _npy_header(file)
            if fortran and len(shape) > 1:
                raise VectorFileError(f"{path}: {name} is in Fortran order; save np.ascontiguousarray(x)")
            arrays[name.removesuffix(".npy")] = _Array(shape, dtype, _zip_reader(archive, name, shape, dtype))
    except _DAMAGE as error:
        if isinstance(error, VectorFileError):
            raise
        raise VectorFileError(f"{path}: {_damage(error)}") from None
    return _checked(path, arrays)


def open_safetensors(path: Path) -> VectorFile:
    """A .safetensors file, mapped."""
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        n_header = int.from_bytes(file.read(8), "little")
        if not 2 <= n_header <= min(size - 8, _MAX_HEADER):
            raise VectorFileError(f"{path} is not a safetensors file")
        header = file.read(n_header)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        arrays = {}
        for name, entry in entries.items():
            if entry["dtype"] not in _SAFETENSORS:
                continue
            dtype, shape = np.dtype(_SAFETENSORS[entry["dtype"]]), tuple(map(int, entry["shape"]))
            first, last = entry["data_offsets"]
            if last - first != math.prod(shape) * dtype.itemsize or not 0 <= first <= last <= size - 8 - n_header:
                raise ValueError(f"{name} does not fit its place")
            if last > first and shape:
                arrays[name] = _mapped(np.memmap(path, dtype, "r", offset=8 + n_header + first, shape=shape))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise VectorFileError(f"{path} is not a safetensors file, or damaged: {error}") from None
    return _checked(path, arrays)


def _checked(path: Path, arrays: dict[str, _Array]) -> ArrayFile:
    for name, array in arrays.items():
        if len(arrays) == 1 and array.dtype.hasobject:
            raise VectorFileError(f"{path}: {name} is an array of objects (ragged?), expected numbers (N, D)")
        if len(arrays) == 1 and not array.field(name).is_vector:
            raise VectorFileError(f"{path}: {array.field(name)}, expected numbers of shape (N, D)")
    return ArrayFile(path, arrays)


def _mapped(array: Array) -> _Array:
    def read(start: int, n_rows: int) -> Iterator[Array]:
        for first in range(start, len(array), n_rows):
            yield np.asarray(array[first : first + n_rows])

    return _Array(array.shape, array.dtype, read)


def _zip_reader(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    def pieces(start: int, n_rows: int) -> Iterator[Array]:
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        with archive.open(name) as file:
            _npy_header(file)
            for first in range(0, shape[0], n_rows):
                rows = min(n_rows, shape[0] - first)
                data = file.read(rows * row_bytes)
                if len(data) < rows * row_bytes:
                    raise VectorFileError(f"{archive.filename}: {name} ends after {first} rows, expected {shape[0]}")
                if first + rows > start:
                    yield np.frombuffer(data, dtype).reshape(rows, *shape[1:])[max(0, start - first) :]

    def read(start: int, n_rows: int) -> Iterator[Array]:
        try:
            yield from pieces(start, n_rows)
        except VectorFileError:
            raise
        except _DAMAGE as error:  # in the middle of a compressed array, or in its checksum
            raise VectorFileError(f"{archive.filename}: {name}: {_damage(error)}") from None

    return read


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _is_number(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "fiu" or dtype == np.dtype(ml_dtypes.bfloat16)


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _damage(error: Exception) -> str:
    if any(word in str(error) for word in ("Object arrays", "Python objects", "pickle")):
        return "an array of objects (ragged?), which is not read; expected numbers of shape (N, D)"
    return f"not readable: {error}"
