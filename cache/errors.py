"""Every error that a cache can raise.

CacheError
├── NotACacheError            (FileNotFoundError)   no cache at this path
├── IncompleteCacheError                            a harvest has not finished here
├── CorruptCacheError                               a file is missing, damaged or of another size
│   └── MissingFileError      (FileNotFoundError)
├── UnsupportedFormatError                          a format or version that this code does not know
├── CacheMismatchError                              the folder holds a cache of something else
├── CacheExistsError          (FileExistsError)     the folder holds something that is not a cache
├── CacheLockedError                                another process writes here now
├── ConcurrentWriteError                            another process wrote the same shard in spite of the lock
├── SpecError                 (ValueError)          an invalid cache specification: names, sizes, dtypes
├── BadRowsError              (ValueError)          rows that break the writer's contract
├── BadActivationError        (ValueError)          NaN, Inf, or a value that the storage dtype cannot hold
├── StorageLossError          (ValueError)          a storage dtype that would lose too much of these rows
├── DiskFullError             (OSError)             no space left while writing
├── SelectionError            (ValueError)          filters, holdout or batch size that leave nothing to deliver
├── UnknownNameError          (KeyError)            no hook point, column or shard of this name
└── RowLookupError            (LookupError)         what was asked of a row is not stored
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from pathlib import Path

from sae_granary.common.errors import GranaryError
from sae_granary.common.lock import LockedError


class CacheError(GranaryError):
    """Base of everything that goes wrong with an activation cache."""


class NotACacheError(CacheError, FileNotFoundError):
    """There is no cache at this path."""


class IncompleteCacheError(CacheError):
    """The harvest that writes this cache has not finished."""


class CorruptCacheError(CacheError):
    """A file of the cache is missing, damaged, of another size, or not what its name says."""


class MissingFileError(CorruptCacheError, FileNotFoundError):
    """A file that a commit record promises does not exist."""


class UnsupportedFormatError(CacheError):
    """The files name a format or a version that this code does not know."""


class CacheExistsError(CacheError, FileExistsError):
    """The folder holds something that is not a cache."""


class ConcurrentWriteError(CacheError):
    """Another process wrote the same shard in spite of the lock; nothing of it was overwritten."""


class SpecError(CacheError, ValueError):
    """An invalid cache specification: a name, a size or a dtype is out of range."""


class BadRowsError(CacheError, ValueError):
    """The rows handed to the writer break its contract (shapes, order, whole windows)."""


class SelectionError(CacheError, ValueError):
    """A loader has no rows to deliver: its filters, holdout, batch size or state do not fit the cache."""


class UnknownNameError(CacheError, KeyError):
    """No hook point, column or shard of this name."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class RowLookupError(CacheError, LookupError):
    """The requested information about a row is not stored in this cache."""


class CacheMismatchError(CacheError):
    """The folder holds another cache. `differences` maps each differing field to (stored, requested)."""

    def __init__(self, path: Path, differences: Mapping[str, tuple[object, object]], suggestion: str) -> None:
        self.path, self.differences, self.suggestion = path, dict(differences), suggestion
        lines = [
            f"  {name}: the cache has {have!r}, this command wants {want!r}"
            for name, (have, want) in self.differences.items()
        ]
        super().__init__(
            "\n".join(
                [f"{path} was harvested from something else:", *lines, f"use another name, e.g. --out {suggestion}"]
            )
        )


class CacheLockedError(CacheError):
    """Another process writes this cache now; `pid` and `age` (seconds) are None where they are not known."""

    def __init__(self, path: Path, pid: int | None, age: float | None) -> None:
        self.path, self.pid, self.age = path, pid, age
        holder = LockedError(path, pid, age).holder
        super().__init__(f"{path} is being written by {holder}; wait for it, stop it, or use another --out")


class BadActivationError(CacheError, ValueError):
    """A NaN, an Inf, or a value that the storage dtype cannot hold; `row` is the row id that it would have had."""

    def __init__(self, hook: str, doc_id: int, row: int, value: float, dtype: str, wider: Sequence[str] = ()) -> None:
        self.hook, self.doc_id, self.row, self.value, self.dtype = hook, doc_id, row, value, dtype
        finite = value == value and abs(value) != float("inf")
        problem = f"value {value!r} is out of the range of {dtype}" if finite else f"value {value!r}"
        remedy = f"store a wider dtype (--dtype {' or '.join(wider)})" if finite else "check the model's compute dtype"
        super().__init__(f"hook point {hook!r}, document {doc_id}, row {row}: {problem}; {remedy}")


class StorageLossError(CacheError, ValueError):
    """The storage dtype would lose too much of these activations; nothing of them was written."""


class DiskFullError(CacheError, OSError):
    """No space left while writing; committed shards stay valid."""

    def __init__(self, path: Path, needed_bytes: int | None, free_bytes: int) -> None:
        self.path, self.needed_bytes, self.free_bytes = path, needed_bytes, free_bytes
        need = "" if needed_bytes is None else f"{needed_bytes:,} bytes needed for the next shard, "
        message = (
            f"no space left for {path}: {need}{free_bytes:,} bytes free; "
            "free some space and run the same command again: it continues after the last committed shard"
        )
        super().__init__(errno.ENOSPC, message)

    def __str__(self) -> str:
        return str(self.args[1])
