"""Files of vectors by their format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from sae_granary.cache.vectors.arrays import open_npy, open_npz, open_safetensors
from sae_granary.cache.vectors.fields import VectorFile, VectorFileError
from sae_granary.cache.vectors.tables import ArrowFile, ParquetFile
from sae_granary.common.files import NotRegularError, open_regular

FORMATS: Mapping[str, Callable[[Path], VectorFile]] = {
    "npy": open_npy,
    "npz": open_npz,
    "parquet": ParquetFile,
    "safetensors": open_safetensors,
    "arrow": ArrowFile,
}
_ENDINGS = {"feather": "arrow", "pq": "parquet"} | {name: name for name in FORMATS}


def open_vectors(path: Path, kind: str | None = None) -> VectorFile:
    """A file of vectors, by its ending or as `kind`."""
    kind = kind or _ENDINGS.get(path.suffix.lower().removeprefix("."))
    if kind is None or kind not in FORMATS:
        known = ", ".join(FORMATS)
        wrong = f"{path}: the ending is not of a known format" if kind is None else f"--format is {kind!r}"
        raise VectorFileError(f"{wrong}; expected --format {known}")
    try:
        open_regular(path).close()
    except FileNotFoundError:
        raise VectorFileError(f"{path} does not exist") from None
    except NotRegularError as error:
        raise VectorFileError(f"{path} is {error.strerror}, expected a file of vectors") from None
    return FORMATS[kind](path)
