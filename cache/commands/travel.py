"""`sae-cache push` and `pull`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae_granary.cache.commands.shared import CachePath, console
from sae_granary.common.app import Debug, Quiet, echo, expected_errors, fail, takes_flags_of

if TYPE_CHECKING:
    from sae_granary.cache.remote.pull import PullPlan
    from sae_granary.cache.remote.push import PushPlan

Url = Annotated[
    str, typer.Argument(help="s3://bucket/name, file:///folder, gs://..., hf://datasets/...", show_default=False)
]
INTERRUPTED = "interrupted; the same command continues"


@dataclass(frozen=True)
class Wanted:
    """What of a cache is copied."""

    hooks: list[str]  # empty: all
    n_rows: int | None  # None: all
    dry_run: bool


def _wanted(
    *,
    hook: Annotated[
        str | None, typer.Option("--hook", help="Only these hook points (a,b), also added ones.", show_default=False)
    ] = None,
    rows: Annotated[
        str | None, typer.Option("--rows", help="Only the first shards, with this many rows.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "--plan", help="Show what would be copied: files and bytes.")
    ] = False,
) -> Wanted:
    """The options that both commands have. Exits with 2 for a number of rows that is none."""
    from sae_granary.common.quantities import parse_count

    hooks = [name.strip() for name in (hook or "").split(",") if name.strip()]
    try:
        return Wanted(hooks, None if rows is None else parse_count(rows), dry_run)
    except ValueError as error:
        fail(f"error: --rows: {error}", 2)


takes_wanted = takes_flags_of(_wanted)


@takes_wanted
def push(
    read_wanted: Callable[[], Wanted],
    source: CachePath,
    url: Url,
    yes: Annotated[bool, typer.Option("--yes", help="Allow a public destination.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read everything back and check it.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Copy a cache to remote storage. The same command continues a push that was cut off, or adds what is new."""
    with expected_errors(debug, interrupted=INTERRUPTED):
        from sae_granary.cache.remote import push as pushing
        from sae_granary.common.quantities import byte_size

        wanted = read_wanted()
        plan = pushing.plan_push(source, url, hooks=wanted.hooks, n_rows=wanted.n_rows)
        if plan.complete and not verify:
            echo(f"{url} is complete already, nothing to do")
            return
        told = f"{_told(plan)}{byte_size(plan.n_bytes)} to copy"
        if wanted.dry_run or (plan.public is not None and not yes):
            why = "" if plan.public is None or yes else f"; {plan.public}: add --yes to push"
            echo(f"{source} -> {url}: {told}{why}; nothing was copied, checksums are read when it is")
            return
        with _progress("pushing", plan.n_bytes, quiet) as advance:
            pushing.push(plan, verify=verify, progress=advance)
        echo(
            f"{source} -> {url}: {plan.parcel.n_rows:,} rows, complete" + (", read back and verified" if verify else "")
        )


@takes_wanted
def pull(
    read_wanted: Callable[[], Wanted],
    url: Url,
    target: Annotated[Path, typer.Argument(help="Folder of the copy.", show_default=False)],
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Copy a cache from remote storage; every file is checked as it arrives. The same command continues.

    --dry-run also shows the disk space that is needed and free, and exits with 1 if it is too little.
    """
    with expected_errors(debug, interrupted=INTERRUPTED):
        from sae_granary.cache.remote import pull as pulling

        wanted = read_wanted()
        plan = pulling.plan_pull(url, target, hooks=wanted.hooks, n_rows=wanted.n_rows)
        for name in plan.left_out:
            echo(f"left out: {url}/added/{name}, of which a push has not finished", err=True)
        if plan.complete:
            echo(f"{target} is complete already, nothing to do")
            return
        if wanted.dry_run:
            fits = plan.disk_bytes <= plan.free_bytes
            space = f"{_size(plan.disk_bytes)} of disk needed, {_size(plan.free_bytes)} free"
            echo(
                f"{url} -> {target}: {_told(plan)}{_size(plan.n_bytes - plan.n_begun)} to fetch, {space}"
                f"{'' if fits else ': it does NOT fit'}; nothing was copied"
            )
            raise typer.Exit(0 if fits else 1)
        with _progress("pulling", plan.n_bytes, quiet) as advance:
            pulling.pull(plan, progress=advance)
        echo(f"{url} -> {target}: {plan.parcel.n_rows:,} rows, complete and verified")


def _told(plan: PushPlan | PullPlan) -> str:
    parts = (plan, *plan.added)
    missing, files = sum(len(part.missing) for part in parts), sum(len(part.parcel.files) for part in parts)
    added = [hook.name for part in plan.added for hook in part.parcel.manifest.hook_points]
    also = f" with {', '.join(added)}" if added else ""
    return f"{plan.parcel.n_rows:,} rows{also}, {missing} of {files} files, "


def _size(n_bytes: int) -> str:
    from sae_granary.common.quantities import byte_size

    return f"{n_bytes:,} bytes ({byte_size(n_bytes)})"


@contextmanager
def _progress(what: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    err = console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n_bytes: bar.advance(task, n_bytes)
