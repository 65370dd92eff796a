"""`sae-cache import`: files of vectors, in the order given, become one cache.

What does not depend on the rows is checked first: formats, columns, widths. The files are then hashed, so that an
import that was killed continues only from the same files, and read once in batches of bounded size. An error in a row
removes what was written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae_granary.cache.errors import BadActivationError, CacheError
from sae_granary.cache.format.layout import cache_layout, default_rows_per_shard
from sae_granary.cache.format.manifest import Manifest
from sae_granary.cache.format.records import existing_manifest, refuse_mismatch
from sae_granary.cache.vectors.documents import document_bytes, kept_columns
from sae_granary.cache.vectors.fields import Columns, VectorFile, VectorFileError
from sae_granary.cache.vectors.formats import open_vectors
from sae_granary.cache.vectors.values import BadVectorError, vectors_of
from sae_granary.cache.vectors.writer import VectorWriter, vector_spec
from sae_granary.cache.write.disk_space import planned_bytes
from sae_granary.common import files as disk
from sae_granary.common.files import hash_files
from sae_granary.common.quantities import byte_size
from sae_granary.common.rows import HookPoint
from sae_granary.common.signed import digest


@dataclass(frozen=True)
class ImportPlan:
    """A checked import."""

    out: Path
    files: tuple[VectorFile, ...]
    columns: Columns
    hook: str
    d_in: int
    dtype: str
    rows_per_shard: int
    model: str | None
    n_rows: int | None  # None if the files must be read to count them

    document_bytes: float = 0.0  # of a row's document on disk

    @property
    def n_bytes(self) -> int | None:
        """About the size of the cache."""
        if self.n_rows is None:
            return None
        point = HookPoint(self.hook, "", "output", None, self.d_in)
        layout = cache_layout([point], self.dtype, self.rows_per_shard)
        return planned_bytes(layout, self.n_rows, self.n_rows * self.document_bytes)

    @property
    def free_bytes(self) -> int:
        """Disk space that is free."""
        return disk.free_bytes(self.out)

    @property
    def fits(self) -> bool:
        """Whether the disk has room, as far as known."""
        return self.n_bytes is None or self.n_bytes <= self.free_bytes


@dataclass(frozen=True)
class ImportResult:
    """What an import did."""

    path: Path
    n_rows: int
    resumed_rows: int
    already_complete: bool = False


def plan_import(
    files: Sequence[Path],
    out: Path,
    *,
    kind: str | None = None,
    column: str | None = None,
    id_column: str | None = None,
    text_column: str | None = None,
    keep_columns: Sequence[str] = (),
    hook: str = "vectors",
    dtype: str = "auto",
    model: str | None = None,
    rows_per_shard: int | None = None,
) -> ImportPlan:
    """Open the files and check all that can be known without their rows; nothing is written.

    Raises VectorFileError, SpecError, CacheExistsError.
    """
    existing_manifest(out)
    opened = [open_vectors(path, kind) for path in files]
    if not opened:
        raise VectorFileError("no files were given")
    columns = opened[0].choose(column, ids=id_column, texts=text_column, keep=keep_columns)
    width = opened[0].width(columns.vectors)
    if width < 1:
        raise opened[0].error(f"{columns.vectors} has no numbers in its first row")
    for file in opened:
        file.choose(columns.vectors, ids=id_column, texts=text_column, keep=keep_columns)
        if file.n_rows(columns.vectors) == 0:
            raise file.error("it has no rows; leave it out")
        if (found := file.width(columns.vectors)) != width:
            raise file.error(f"vectors of {found} numbers, those of {opened[0].path} have {width}")
    if dtype == "auto":
        first = next(opened[0].batches([columns.vectors], width, 0))
        dtype = vectors_of(first[columns.vectors][:0], width).dtype.name
    vector_spec(hook, width, dtype, 1 if rows_per_shard is None else rows_per_shard)  # raises for what cannot be
    rows_per_shard = rows_per_shard or default_rows_per_shard(width, dtype)
    counts = [file.n_rows(columns.vectors) for file in opened]
    known = [n for n in counts if n is not None]
    return ImportPlan(
        out=out,
        files=tuple(opened),
        columns=columns,
        hook=hook,
        d_in=width,
        dtype=dtype,
        rows_per_shard=rows_per_shard,
        model=model,
        n_rows=sum(known) if len(known) == len(counts) else None,
        document_bytes=document_bytes(opened[0], columns, width),
    )


def import_vectors(plan: ImportPlan, progress: Callable[[int], None] = lambda done: None) -> ImportResult:
    """Write the cache, or continue it; `progress(rows)` is called after each batch.

    Raises VectorFileError for a bad row, naming file and row: nothing is left of the cache then.
    """
    _check_space(plan)
    origin = _origin(plan)
    have = existing_manifest(plan.out)
    if have is not None and have.complete:
        refuse_mismatch(plan.out, have, _wanted(plan, have, origin))
        return ImportResult(plan.out, sum(record.n_rows for record in have.shards), 0, already_complete=True)
    writer = VectorWriter(
        plan.out,
        d_in=plan.d_in,
        hook=plan.hook,
        dtype=plan.dtype,
        model=plan.model,
        rows_per_shard=plan.rows_per_shard,
        resume=True,
        origin=origin,
    )
    resumed = writer.n_rows
    try:
        with writer:
            for file, row, batch in _batches(plan, writer, resumed):
                _add(writer, plan.columns, file, row, batch)
                progress(writer.n_rows)
    except (CacheError, UnicodeError) as error:
        if isinstance(error, (VectorFileError, BadVectorError, BadActivationError)):
            writer.discard()
        raise
    return ImportResult(plan.out, writer.n_rows, resumed)


def _wanted(plan: ImportPlan, have: Manifest, origin: Mapping[str, Any]) -> Manifest:
    """The manifest of a complete cache as the import would have written it."""
    kept = kept_columns(plan.columns)
    spec = vector_spec(plan.hook, plan.d_in, plan.dtype, plan.rows_per_shard, plan.model, kept, origin)
    return replace(have, kept_columns=kept, fingerprint=spec.fingerprint)


def _batches(plan: ImportPlan, writer: VectorWriter, skip: int) -> Iterator[tuple[VectorFile, int, dict[str, Any]]]:
    """File, row in it, and the batch; of rows that are committed only the ids are read."""
    for file in plan.files:
        start = 0
        if skip and plan.columns.ids is not None:
            for part in file.batches([plan.columns.ids], 1, 0):
                ids = part[plan.columns.ids][: skip - start]
                writer.check_ids(ids)
                start += len(ids)
                if start >= skip:
                    break
        elif skip:
            n_rows = file.n_rows(plan.columns.vectors)
            start = min(skip, n_rows if n_rows is not None else skip)
        skip -= start
        row = start
        for batch in file.batches(plan.columns.names, plan.d_in, start):
            yield file, row, batch
            row += len(batch[plan.columns.vectors])


def _add(writer: VectorWriter, columns: Columns, file: VectorFile, row: int, batch: dict[str, Any]) -> None:
    before = writer.n_rows
    texts = None if columns.texts is None else [_text(file, row + i, v) for i, v in enumerate(batch[columns.texts])]
    try:
        writer.add(
            batch[columns.vectors],
            texts=texts,
            ids=None if columns.ids is None else batch[columns.ids],
            columns={name: batch[name] for name in columns.keep},
            source=file.path.name,
            source_row=row,
        )
    except BadVectorError as error:
        raise file.error(f"row {row + error.row}: {error.problem}") from None
    except BadActivationError as error:
        raise file.error(f"row {row + error.doc_id - before}: {str(error).split(': ', 1)[-1]}") from None


def _text(file: VectorFile, row: int, value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise file.error(f"row {row}: the text is {value!r:.60}, expected a string")
    return value.encode("utf-8", "replace").decode()


def _origin(plan: ImportPlan) -> dict[str, Any]:
    """What determines the contents: the files' names and bytes, and the columns taken."""
    everything = digest("\n".join(f"{file.path.name} {hash_files([file.path])}" for file in plan.files).encode())
    return {
        "source": "import",
        "files": len(plan.files),
        "files_xxh3": everything,
        "columns": ", ".join(plan.columns.names),
    }


def _check_space(plan: ImportPlan) -> None:
    if not plan.out.exists() and not plan.fits:
        needed, free = byte_size(plan.n_bytes or 0), byte_size(plan.free_bytes)
        raise CacheError(f"no space for {plan.out}: {needed} needed, {free} free; use --dtype or another --out")
