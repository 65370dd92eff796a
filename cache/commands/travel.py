"""`sae-cache push` and `pull`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae_granary.cache.commands.shared import CachePath, console
from sae_granary.common.app import Debug, Quiet, echo, expected_errors, fail

if TYPE_CHECKING:
    from sae_granary.cache.remote.pull import PullPlan
    from sae_granary.cache.remote.push import PushPlan

Url = Annotated[
    str, typer.Argument(help="s3://bucket/name, file:///folder, gs://..., hf://datasets/...", show_default=False)
]
Hooks = Annotated[
    str | None, typer.Option("--hook", help="Only these hook points (a,b), also added ones.", show_default=False)
]
Rows = Annotated[
    str | None, typer.Option("--rows", help="Only the first shards, with this many rows.", show_default=False)
]
DryRun = Annotated[bool, typer.Option("--dry-run", "--plan", help="Show what would be copied.")]
INTERRUPTED = "interrupted; the same command continues"


def push(
    source: CachePath,
    url: Url,
    hook: Hooks = None,
    rows: Rows = None,
    yes: Annotated[bool, typer.Option("--yes", help="Allow a public destination.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read everything back and check it.")] = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Copy a cache to remote storage. The same command continues a push that was cut off, or adds what is new."""
    with expected_errors(debug, interrupted=INTERRUPTED):
        from sae_granary.cache.remote import push as pushing
        from sae_granary.common.quantities import byte_size

        plan = pushing.plan_push(source, url, hooks=_names(hook), n_rows=_count(rows))
        if plan.complete and not verify:
            echo(f"{url} is complete already, nothing to do")
            return
        told = f"{_told(plan)}{byte_size(plan.n_bytes)} to copy"
        if dry_run or (plan.public is not None and not yes):
            why = "" if plan.public is None or yes else f"; {plan.public}: add --yes to push"
            echo(f"{source} -> {url}: {told}{why}; nothing was copied")
            return
        with _progress("pushing", plan.n_bytes, quiet) as advance:
            pushing.push(plan, verify=verify, progress=advance)
        echo(
            f"{source} -> {url}: {plan.parcel.n_rows:,} rows, complete" + (", read back and verified" if verify else "")
        )


def pull(
    url: Url,
    target: Annotated[Path, typer.Argument(help="Folder of the copy.", show_default=False)],
    hook: Hooks = None,
    rows: Rows = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Copy a cache from remote storage; every file is checked as it arrives. The same command continues."""
    with expected_errors(debug, interrupted=INTERRUPTED):
        from sae_granary.cache.remote import pull as pulling
        from sae_granary.common.quantities import byte_size

        plan = pulling.plan_pull(url, target, hooks=_names(hook), n_rows=_count(rows))
        for name in plan.left_out:
            echo(f"left out: {url}/added/{name}, of which a push has not finished", err=True)
        if plan.complete:
            echo(f"{target} is complete already, nothing to do")
            return
        if dry_run:
            echo(f"{url} -> {target}: {_told(plan)}{byte_size(plan.n_bytes)} to copy; nothing was copied")
            return
        with _progress("pulling", plan.n_bytes, quiet) as advance:
            pulling.pull(plan, progress=advance)
        echo(f"{url} -> {target}: {plan.parcel.n_rows:,} rows, complete and verified")


def _told(plan: PushPlan | PullPlan) -> str:
    parts = (plan, *plan.added)
    missing, files = sum(len(part.missing) for part in parts), sum(len(part.parcel.files) for part in parts)
    added = [hook.name for part in plan.added for hook in part.parcel.manifest.hook_points]
    also = f" with {', '.join(added)}" if added else ""
    return f"{plan.parcel.n_rows:,} rows{also}, {missing} of {files} files, "


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _count(text: str | None) -> int | None:
    from sae_granary.common.quantities import parse_count

    try:
        return None if text is None else parse_count(text)
    except ValueError as error:
        fail(f"error: --rows: {error}", 2)


@contextmanager
def _progress(what: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    err = console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n_bytes: bar.advance(task, n_bytes)
