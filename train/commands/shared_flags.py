"""What the commands share: flags, and how an expected failure becomes one red line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer

from sae_granary.train.config.flags import Given

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what has that name.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Layers = Annotated[
    str | None, typer.Option("--layers", help="One SAE for each: all, or 2,4,6. One pass trains them all.")
]
LayerStride = Annotated[
    int | None, typer.Option("--layer-stride", help="Every n-th of these layers. (default: 1)", min=1)
]
ReadFlags = Callable[[], Given]

NO_CACHE = "error: no cache was given; name its folder with --cache (sae-harvest run makes one)"


@contextmanager
def errors(debug: bool) -> Iterator[None]:
    """Expected failures become one red line and exit code 2; a signal its own code."""
    from sae_granary.common.errors import GranaryError
    from sae_granary.train.errors import InterruptedRunError

    try:
        yield
    except (InterruptedRunError, KeyboardInterrupt) as error:
        if isinstance(error, InterruptedRunError):
            fail(str(error), 128 + error.signum)
        fail("interrupted at once: continue from the last checkpoint with `sae-train resume`", 130)
    except Exception as error:
        if debug or not isinstance(error, GranaryError | OSError):
            raise
        fail(f"error: {_one_line(error)}", 2)


def _one_line(error: Exception) -> str:
    """The message of an expected error; of one from the system, what failed and how to go on."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}; what was committed is safe: mend that, then `sae-train resume` goes on"


def fail(message: str, code: int) -> NoReturn:
    """Print a red line and exit."""
    typer.secho(message, fg="red", err=True)
    raise typer.Exit(code)
