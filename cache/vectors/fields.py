"""What a file of vectors holds, in any format, and which parts of it an import takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_granary.cache.errors import CacheError
from sae_granary.common.errors import nearest

BATCH_BYTES, BATCH_ROWS = 8 << 20, 8192  # of vectors that are read at once; the smaller one counts


class VectorFileError(CacheError, ValueError):
    """A file that cannot be imported: another format, damaged, or without vectors."""


@dataclass(frozen=True)
class Field:
    """A column or array of a file."""

    name: str
    is_vector: bool  # one vector of numbers per row
    type: str  # as the file calls it
    width: int | None = None  # of a vector, where the file says it before its rows are read

    def __str__(self) -> str:
        return f"{self.name} ({self.type})"


@dataclass(frozen=True)
class Columns:
    """What an import takes of each file."""

    vectors: str
    ids: str | None = None
    texts: str | None = None
    keep: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """All of them, once each."""
        return list(dict.fromkeys([self.vectors, *(n for n in (self.ids, self.texts) if n is not None), *self.keep]))


class VectorFile(ABC):
    """An open file of rows; made by `open_vectors`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    @abstractmethod
    def fields(self) -> dict[str, Field]:
        """Its columns or arrays by name."""

    @abstractmethod
    def n_rows(self, name: str) -> int | None:
        """Rows of a field; None if the file must be read to count them."""

    @abstractmethod
    def batches(self, names: Sequence[str], width: int, start: int) -> Iterator[dict[str, Any]]:
        """From row `start` on: field -> (N, width) array of vectors or a list of N values."""

    @abstractmethod
    def width(self, name: str) -> int:
        """Numbers in a vector."""

    def error(self, problem: str) -> VectorFileError:
        """An error of this file."""
        return VectorFileError(f"{self.path}: {problem}")

    def choose(
        self, vectors: str | None = None, *, ids: str | None = None, texts: str | None = None, keep: Sequence[str] = ()
    ) -> Columns:
        """The columns to take, as named by the flags; the vectors are found where only one field holds any."""
        if vectors is None:
            found = [field.name for field in self.fields.values() if field.is_vector]
            if len(found) != 1:
                there = ", ".join(map(str, self.fields.values())) or "nothing"
                what = "no vectors" if not found else f"several vectors ({', '.join(found)})"
                raise self.error(f"holds {what}; it has {there}: name them with --column")
            vectors = found[0]
        columns = Columns(vectors, ids, texts, tuple(keep))
        for flag, name in [("--column", vectors), ("--id-column", ids), ("--text-column", texts)] + [
            ("--keep-columns", name) for name in keep
        ]:
            if name is not None and name not in self.fields:
                there = ", ".join(self.fields)
                raise self.error(f"{flag} {name}: no such column{nearest(name, self.fields)}; there are {there}")
        if not self.fields[vectors].is_vector:
            raise self.error(f"--column {self.fields[vectors]} is not one vector of numbers per row")
        return columns


def batch_rows(row_bytes: int) -> int:
    """Rows that are read at once."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, row_bytes)))
