"""A cache written from Python, one vector per row.

from sae_granary import CacheWriter

with CacheWriter("cache/my_vectors", hook="clip_image", d_in=512) as writer:
    for images, names in batches:
        writer.add(encode(images), texts=names)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sae_granary.cache.errors import BadRowsError, CacheExistsError
from sae_granary.cache.format.layout import default_rows_per_shard
from sae_granary.cache.format.records import existing_manifest, load_records, remove_contents
from sae_granary.cache.format.spec import CacheSpec
from sae_granary.cache.vectors.documents import ID
from sae_granary.cache.vectors.ids import SeenIds
from sae_granary.cache.vectors.values import BadVectorError, contents, plain_values, rows_of, vectors_of
from sae_granary.cache.write import writer as rows_writer
from sae_granary.common.rows import DocumentRow, HookPoint, Scalar

UNNAMED = "python"


class VectorWriter:
    """Writes a cache of vectors; exported as `sae_granary.CacheWriter`.

    Leaving the `with` block completes the cache. After an error in it, or a kill, the shards committed so far stay, and
    the same call with `resume=True` continues: `n_rows` rows are there already, add those after them.

    >>> import numpy as np
    >>> from sae_granary import CacheWriter, open_cache
    >>> with CacheWriter("cache/clip", hook="clip_image", d_in=512) as writer:
    ...     writer.add(np.ones((3, 512)), texts=["a cat", "a dog", "a hat"], ids=[7, 8, 9])
    >>> open_cache("cache/clip").hook("clip_image")[:].shape
    (3, 512)

    Args:
        path: folder of the new cache.
        hook: name of the vectors, a folder name; `--hook` of the commands.
        d_in: width of a vector.
        dtype: float32, float16, bfloat16, or auto: that of the first rows if it is one of these, else float32.
        model: what made the vectors, for people.
        rows_per_shard: a shard is committed when it is full. (default: about 256 MiB)
        resume: continue an unfinished cache.
        origin: what determines the contents, flat JSON; a cache with another origin is not continued.

    Raises:
        CacheExistsError: the folder holds a cache or something else.
        SpecError: an invalid name, size or dtype.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        d_in: int,
        hook: str = "vectors",
        dtype: str = "auto",
        model: str | None = None,
        rows_per_shard: int | None = None,
        resume: bool = False,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.d_in, self._dtype, self._model = Path(path), d_in, dtype, model
        self._hook = hook
        self._rows_per_shard, self._origin = rows_per_shard, origin
        self._ids = SeenIds()
        self._writer: rows_writer.CacheWriter | None = None
        vector_spec(
            hook, d_in, "float32" if dtype == "auto" else dtype, 1 if rows_per_shard is None else rows_per_shard
        )
        self.n_rows = self._begun(resume)

    def _begun(self, resume: bool) -> int:
        """Rows of an unfinished cache that is continued. Raises CacheExistsError for any other."""
        have = existing_manifest(self.path)
        if have is None:
            return 0
        n_rows = sum(record.n_rows for record in load_records(self.path, have)) if not have.complete else 0
        if have.complete or (n_rows and not resume):
            state = "a complete cache" if have.complete else f"an unfinished cache of {n_rows:,} rows"
            hint = "" if have.complete else "; resume=True continues it"
            raise CacheExistsError(f"{self.path} holds {state}{hint}: remove it, or use another path")
        return n_rows

    def add(
        self,
        rows: Any,
        *,
        texts: Sequence[str] | None = None,
        ids: Sequence[str] | Sequence[int] | None = None,
        columns: Mapping[str, Sequence[Scalar]] | None = None,
        source: str = UNNAMED,
        source_row: int | None = None,
    ) -> None:
        """Add vectors (N, d_in): a numpy array, a torch tensor or lists; with a text, an id and values for each.

        Ids must differ; every call gives the same `columns`, and ids or none. `source` and `source_row` (of the first
        row) say where they come from. Raises BadRowsError, BadActivationError (NaN, Inf, out of range).
        """
        values = vectors_of(rows, self.d_in)
        kept: dict[str, Sequence[Scalar]] = dict(columns or {})
        if ids is not None:
            if ID in kept:
                raise BadRowsError(f"a column is called {ID!r}, and there are ids: rename the column")
            kept = {ID: ids, **kept}
        for name, given in {**kept, "texts": texts}.items():
            if given is not None and len(given) != len(values):
                raise BadRowsError(f"{name}: {len(given)} values for {len(values)} rows")
        if not len(values):
            return
        if ids is not None:
            self.check_ids(ids)
        writer = self._opened(values.dtype.name if self._dtype == "auto" else self._dtype, tuple(kept))
        first = self.n_rows
        kept = {name: plain_values(name, given) for name, given in kept.items()}
        number = np.arange(first, first + len(values), dtype=np.int64)
        origin_row = first if source_row is None else source_row
        documents = [
            DocumentRow(
                first + i,
                source,
                origin_row + i,
                "" if texts is None else texts[i],
                {name: given[i] for name, given in kept.items()},
            )
            for i in range(len(values))
        ]
        writer.append(rows_of(self._hook, values, number), documents)
        self.n_rows += len(values)

    def check_ids(self, ids: Sequence[Scalar]) -> None:
        """Remember the ids of rows. Raises BadVectorError for a missing or repeated id."""
        plain = plain_values(ID, ids)
        if None in plain:
            raise BadVectorError(plain.index(None), "an id is missing")
        at = self._ids.add(plain)
        if at is not None:
            raise BadVectorError(at, f"id {plain[at]!r} is there twice")

    def _opened(self, dtype: str, kept: tuple[str, ...]) -> rows_writer.CacheWriter:
        if self._writer is None:
            rows_per_shard = self._rows_per_shard or default_rows_per_shard(self.d_in, dtype)
            spec = vector_spec(self._hook, self.d_in, dtype, rows_per_shard, self._model, kept, self._origin)
            self._writer = rows_writer.CacheWriter.open(self.path, spec)
            if self._writer.n_rows != self.n_rows:
                raise CacheExistsError(f"{self.path} was changed by another process; open it again")
            self._writer.begin_buffer({"row": 0})
            self._writer.skip(self.n_rows)
        elif kept != self._writer.manifest.kept_columns:
            have = ", ".join(self._writer.manifest.kept_columns) or "none"
            raise BadRowsError(f"columns are {', '.join(kept) or 'none'}, the rows before had {have}")
        return self._writer

    def finish(self) -> None:
        """Complete the cache; `with` does it. Raises BadRowsError where no rows were added."""
        if self._writer is None and self.n_rows:  # resumed, and nothing was left to add
            have = existing_manifest(self.path)
            if have is not None:
                self._opened(have.dtype, have.kept_columns)
        if self._writer is None:
            raise BadRowsError(f"{self.path}: no rows were added, and an empty cache is not written")
        writer, summary = self._writer, {"n_rows": self.n_rows, "n_documents": self.n_rows, "ended": "source"}
        if self._origin is None:  # the origin of the rows is unknown: their checksums identify the cache
            writer.end_shard()
            known = contents(load_records(self.path, writer.manifest))
            writer.manifest = replace(writer.manifest, fingerprint={**writer.manifest.fingerprint, **known})
        writer.finish(summary)

    def discard(self) -> None:
        """Close and remove what was written."""
        if self._writer is not None:
            self._writer.close()
            remove_contents(self.path, self._writer.layout)
            self._writer = None
            if self.path.is_dir() and not any(self.path.iterdir()):
                self.path.rmdir()

    def close(self) -> None:
        """Close; committed shards are kept."""
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> VectorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()


def vector_spec(
    hook: str,
    d_in: int,
    dtype: str,
    rows_per_shard: int,
    model: str | None = None,
    kept: tuple[str, ...] = (),
    origin: Mapping[str, Any] | None = None,
) -> CacheSpec:
    """What is promised of a cache of vectors. Raises SpecError, and InvalidHookPointError for a name or width."""
    origin = {"source": UNNAMED} if origin is None else dict(origin)
    return CacheSpec(
        unit="text",
        hook_points=(HookPoint(hook, "", "output", None, d_in),),
        dtype=dtype,
        rows_per_shard=rows_per_shard,
        provenance={"model": None if model is None else {"id": model}, "vectors": origin},
        fingerprint={
            "model": model,
            "unit": "text",
            "hook_points": hook,
            "d_in": d_in,
            "dtype": dtype,
            "rows_per_shard": rows_per_shard,
            "kept_columns": ", ".join(kept),
            **origin,
        },
        kept_columns=kept,
    )
