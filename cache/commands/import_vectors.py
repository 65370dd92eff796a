"""`sae-cache import`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae_granary.cache.commands.shared import Json, RecordUser, console, plain, print_json, progress_bar
from sae_granary.cache.format.storage import STORAGE
from sae_granary.common.app import Debug, Quiet, echo, expected_errors, fail

if TYPE_CHECKING:
    from sae_granary.cache.vectors.importer import ImportPlan

Name = str | None


def _option(about: str, *names: str) -> object:
    return typer.Option(*names, help=about, show_default=False)


def import_files(
    files: Annotated[
        list[Path],
        typer.Argument(help="Files of vectors: .npy, .npz, .parquet, .safetensors, .arrow.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new cache.", show_default=False)],
    kind: Annotated[Name, _option("npy, npz, parquet, safetensors or arrow. (default: by ending)", "--format")] = None,
    column: Annotated[Name, _option("Column or array of the vectors. (default: the only one)", "--column")] = None,
    id_column: Annotated[Name, _option("Column of ids, which must differ; stored as `id`.", "--id-column")] = None,
    text_column: Annotated[Name, _option("Column of the texts that the vectors embed.", "--text-column")] = None,
    keep_columns: Annotated[Name, _option("Columns to store with the rows (a,b).", "--keep-columns")] = None,
    hook: Annotated[str, typer.Option("--hook", help="Name of the vectors in the cache.")] = "vectors",
    dtype: Annotated[str, typer.Option("--dtype", help=f"auto (as in the files), {', '.join(STORAGE)}.")] = "auto",
    model: Annotated[
        Name, _option("Model that made the vectors, as a note: text-embedding-3-small.", "--model")
    ] = None,
    rows_per_shard: Annotated[Name, _option("Rows of a shard. (default: about 256 MiB)", "--rows-per-shard")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", "--dry-run", help="Check the files and show what would be written.")
    ] = False,
    record_user: RecordUser = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make a cache of vectors from anywhere: one row per vector, e.g. embeddings of a service or an image model.

    The same command continues an import that was interrupted. A NaN, an id that repeats, or vectors of different
    widths end it with the file and row, and nothing is written.
    """
    interrupted = "interrupted; the same command continues after the last committed shard"
    with expected_errors(debug, interrupted=interrupted):
        from sae_granary.cache.vectors import importer
        from sae_granary.cache.write.about import record_about
        from sae_granary.common.quantities import parse_count

        try:
            rows = None if rows_per_shard is None else parse_count(rows_per_shard)
        except ValueError as error:
            fail(f"error: --rows-per-shard: {error}", 2)
        checked = importer.plan_import(
            files,
            out,
            kind=kind,
            column=column,
            id_column=id_column,
            text_column=text_column,
            keep_columns=[name.strip() for name in (keep_columns or "").split(",") if name.strip()],
            hook=hook,
            dtype=dtype,
            model=model,
            rows_per_shard=rows,
        )
        if as_json and plan:
            print_json(_plan_json(checked))
        elif not quiet and not as_json:
            _show_plan(checked)
        if plan:
            raise typer.Exit(0 if checked.fits else 1)
        with progress_bar("importing", checked.n_rows, hidden=quiet or as_json) as tell:
            result = importer.import_vectors(checked, tell)
        if not result.already_complete:
            record_about(result.path, user=record_user)
        if as_json:
            print_json({"path": str(result.path), "n_rows": result.n_rows, "resumed_rows": result.resumed_rows})
            return
        done = "was complete already" if result.already_complete else "is complete"
        echo(f"{result.path} {done}: {result.n_rows:,} rows")


def _plan_json(plan: ImportPlan) -> dict[str, object]:
    return {
        "out": str(plan.out),
        "files": [str(file.path) for file in plan.files],
        "columns": vars(plan.columns),
        "hook": plan.hook,
        "d_in": plan.d_in,
        "dtype": plan.dtype,
        "rows_per_shard": plan.rows_per_shard,
        "n_rows": plan.n_rows,
        "n_bytes": plan.n_bytes,
        "free_bytes": plan.free_bytes,
    }


def _show_plan(plan: ImportPlan) -> None:
    from sae_granary.common.quantities import byte_size, counted

    rows = "rows" if plan.n_rows is None else f"{plan.n_rows:,} rows"
    size = "" if plan.n_bytes is None else f", {byte_size(plan.n_bytes)}"
    size += "" if plan.fits else f": it does NOT fit, {byte_size(plan.free_bytes)} are free"
    line = f"{counted(len(plan.files), 'file')}: {rows} of {plan.d_in} numbers ({plan.columns.vectors})"
    console().print(plain(f"{line} -> {plan.out}, hook point {plan.hook}, {plan.dtype}{size}"), soft_wrap=True)
