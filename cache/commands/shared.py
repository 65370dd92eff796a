"""Arguments and output that several commands share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae_granary.common.app import expected_errors, fail, make_console
from sae_granary.common.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def _find(text: str) -> Path:
    """A cache by its path, its name in the folders of GRANARY_CACHE_DIR, or its URL."""
    from sae_granary.cache.remote.mirror import locate

    with expected_errors(debug=False):
        return locate(text)


def _find_local(text: str) -> Path:
    """As `_find`, but no URL: what is remote is not copied."""
    from sae_granary.cache.remote.store import is_url

    if is_url(text):
        fail(f"error: {text} is remote, and rm removes local caches: remove it with the tools of its storage", 2)
    return _find(text)


_ABOUT = "Folder of a cache, e.g. cache/bert_l6, or its name in GRANARY_CACHE_DIR."
CachePath = Annotated[Path, typer.Argument(help=_ABOUT, parser=_find, metavar="PATH", show_default=False)]
CachePaths = Annotated[list[Path], typer.Argument(help=_ABOUT, parser=_find, metavar="PATH...", show_default=False)]
LocalPaths = Annotated[
    list[Path], typer.Argument(help=_ABOUT, parser=_find_local, metavar="PATH...", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
RecordUser = Annotated[bool, typer.Option("--record-user", help="Write your user name into about.json.")]


def print_json(body: object) -> None:
    """Print JSON to standard output."""
    sys.stdout.write(json.dumps(body, indent=2) + "\n")


@contextmanager
def progress_bar(what: str, total: int | None = None, *, hidden: bool = False) -> Iterator[Callable[..., None]]:
    """A bar on standard error where that is a terminal; call it with what is done, and the total."""
    from rich.progress import Progress

    err = console(stderr=True)
    with Progress(console=err, transient=True, disable=hidden or not err.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, total=total: bar.update(task, completed=done, total=total)


def console(*, stderr: bool = False) -> Console:
    """The console that the commands print to; lines of up to 200 characters are not wrapped."""
    return make_console(stderr=stderr, width=200)


def plain(text: str, style: str = "") -> Text:
    """Text of a manifest for the console: control characters are escaped, markup is not interpreted."""
    from rich.text import Text

    return Text(printable(text), style=style)
