"""The rows that a run reads: filters by flag, position and norm, held-out documents; with exact counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from sae_granary.cache.errors import SelectionError
from sae_granary.cache.read.context import token_ids
from sae_granary.common.hashing import derive_key, hash64
from sae_granary.common.rows import FLAG_ABSENT, FLAG_SPECIAL

if TYPE_CHECKING:
    from sae_granary.cache.read.arrays import Column
    from sae_granary.cache.read.reader import Cache

Part = Literal["train", "heldout", "all"]
Columns = Mapping[str, NDArray[Any]]
Mask = NDArray[np.bool_]

_HOLDOUT_DOMAIN = 0x686F_6C64_6F75_74  # "holdout"
_SLICE_ROWS = 2**20  # of the accounting pass


@dataclass(frozen=True)
class Filters:
    """Rows to keep. Norms are those of the stored values; with several hook points each must be within bounds."""

    special: bool = False  # keep special tokens
    first_position: bool | None = None  # keep position 0 of each context; None: only if the model is no decoder
    min_position: int | None = None
    max_position: int | None = None  # inclusive
    min_norm: float | None = None
    max_norm: float | None = None  # inclusive
    exclude_tokens: tuple[int | str, ...] = ()  # ids or strings of the vocabulary; ids once resolved

    @property
    def reads_norms(self) -> bool:
        """Whether rows go by their norms, so that each hook point drops others."""
        return self.min_norm is not None or self.max_norm is not None

    def resolve(self, cache: Cache) -> Filters:
        """Decide what depends on the cache: position 0 of a decoder is an attention sink and goes out.

        Raises SelectionError for a token to exclude that the vocabulary does not have.
        """
        filters = self
        if self.exclude_tokens:
            if cache.unit != "token":
                raise SelectionError(f"{cache.path} holds one row per text, not per token: leave out exclude_tokens")
            filters = replace(self, exclude_tokens=token_ids(self.exclude_tokens, cache.vocabulary, cache.path))
        if self.first_position is not None:
            return filters
        decoder = bool(cache.manifest.model.get("is_decoder", False)) and cache.unit == "token"
        return replace(filters, first_position=not decoder)


@dataclass(frozen=True)
class Holdout:
    """Documents never trained on, chosen by a hash of doc_id and seed: the split stays when the cache grows."""

    fraction: float = 0.05  # of the documents
    seed: int = 0

    def mask(self, doc_id: NDArray[np.int64]) -> Mask:
        """(N,) whether each row's document is held out: hash64(doc_id) below fraction * 2**64."""
        key = derive_key(_HOLDOUT_DOMAIN, self.seed)
        limit = np.uint64(int(self.fraction * 2**63))
        return (hash64(doc_id, key) >> np.uint64(1)) < limit


@dataclass(frozen=True)
class Counts:
    """Rows of the cache by reason; a row dropped for several reasons counts for the first. They sum to total."""

    total: int = 0
    train: int = 0
    heldout: int = 0
    special: int = 0
    excluded: int = 0
    first_position: int = 0
    position: int = 0
    norm: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: n + getattr(other, name) for name, n in vars(self).items()})

    def of(self, part: Part) -> int:
        """Rows that a part delivers in one pass."""
        return {"train": self.train, "heldout": self.heldout, "all": self.train + self.heldout}[part]

    @classmethod
    def from_json(cls, counts: Mapping[str, int]) -> Counts:
        """As `to_json` gave them. Raises SelectionError for rows that went elsewhere."""
        try:
            return cls(**counts)
        except TypeError as error:
            raise SelectionError(f"the row accounting does not fit: {error}") from None

    def to_json(self) -> dict[str, int]:
        """As stored in a run's summary."""
        return asdict(self)


@dataclass(frozen=True)
class Selection:
    """The rows that a reader of a cache wants: filters, a split by documents, and the part of it.

    Once resolved, its methods are pure functions from the columns of some rows to masks.
    """

    filters: Filters = Filters()
    holdout: Holdout = Holdout()
    part: Part = "train"

    def resolve(self, cache: Cache) -> Selection:
        """The same with resolved filters."""
        return replace(self, filters=self.filters.resolve(cache))

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the masks need; "norm" means the norms of every hook point in use."""
        f = self.filters
        needs_position = f.first_position is False or f.min_position is not None or f.max_position is not None
        needed = {
            "flags": True,
            "token_id": bool(f.exclude_tokens),
            "position": needs_position,
            "norm": f.reads_norms,
            "doc_id": self.holdout.fraction > 0,
        }
        return tuple(name for name, wanted in needed.items() if wanted)

    def reasons(self, columns: Columns) -> dict[str, Mask]:
        """Reason -> rows that it drops, in the order in which reasons count. Norms come as "norm:<hook point>"."""
        f, flags = self.filters, columns["flags"]
        out = {"absent": (flags & FLAG_ABSENT) != 0}
        if not f.special:
            out["special"] = (flags & FLAG_SPECIAL) != 0
        if f.exclude_tokens:
            out["excluded"] = np.isin(columns["token_id"], np.array(f.exclude_tokens, np.int64))
        if "position" in columns:
            position = columns["position"]
            if f.first_position is False:
                out["first_position"] = position == 0
            out["position"] = _outside(position, f.min_position, f.max_position)
        norms = [_outside(v, f.min_norm, f.max_norm) for name, v in columns.items() if name.startswith("norm:")]
        if norms:
            out["norm"] = np.logical_or.reduce(norms)
        return out

    def mask(self, columns: Columns) -> Mask:
        """(N,) rows that this part delivers."""
        keep: Mask = ~np.logical_or.reduce(list(self.reasons(columns).values()))
        if self.part == "all" or "doc_id" not in columns:
            return keep if self.part != "heldout" else np.zeros_like(keep)
        heldout = self.holdout.mask(columns["doc_id"])
        return keep & (heldout if self.part == "heldout" else ~heldout)

    def count(self, columns: Columns) -> Counts:
        """Accounting of these rows."""
        left = np.ones(len(columns["flags"]), dtype=np.bool_)
        counts: dict[str, int] = {}
        for reason, drop in self.reasons(columns).items():
            counts[reason] = int(np.count_nonzero(left & drop))
            left &= ~drop
        absent = counts.pop("absent")
        heldout = 0
        if "doc_id" in columns:
            heldout = int(np.count_nonzero(left & self.holdout.mask(columns["doc_id"])))
        n_left = int(np.count_nonzero(left))
        return Counts(total=len(left) - absent, train=n_left - heldout, heldout=heldout, **counts)


TRAIN_ROWS = Selection()


def column_arrays(cache: Cache, selection: Selection, hooks: Sequence[str]) -> dict[str, Column]:
    """The columns that the selection needs, by the names under which its masks take them."""
    names = [n for n in selection.columns if n != "norm"]
    columns = {n: cache.column(n) for n in names}
    if "norm" in selection.columns:
        columns |= {f"norm:{hook}": cache.norms(hook) for hook in hooks}
    return columns


def account(
    cache: Cache,
    selection: Selection,
    hooks: Sequence[str],
    progress: Callable[[float], None] = lambda share: None,
    *,
    enough: int | None = None,
) -> Counts:
    """Count what the filters and the holdout do to a cache, in one streaming pass over its metadata.

    `progress` gets the share of the rows that are counted. With `enough` the count ends when the selection's part
    has so many rows: then `total` may be less than the rows of the cache.
    """
    selection, counts = selection.resolve(cache), Counts()
    arrays = column_arrays(cache, selection, hooks)
    for i in range(len(cache.shards)):
        for columns in _slices({name: array.map(i) for name, array in arrays.items()}):
            counts += selection.count(columns)
            progress(counts.total / cache.n_rows)
            if enough is not None and counts.of(selection.part) >= enough:
                return counts
    return counts


def _slices(columns: Columns) -> Iterator[dict[str, NDArray[Any]]]:
    n_rows = len(columns["flags"])
    for start in range(0, n_rows, _SLICE_ROWS):
        yield {name: np.asarray(values[start : start + _SLICE_ROWS]) for name, values in columns.items()}


def _outside(values: NDArray[Any], low: float | None, high: float | None) -> Mask:
    """Rows outside [low, high]; NaN is outside of every bound."""
    out = np.zeros(len(values), dtype=np.bool_)
    if low is not None:
        out |= ~(values >= low)
    if high is not None:
        out |= ~(values <= high)
    return out
