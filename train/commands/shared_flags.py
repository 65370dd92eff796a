"""What the commands share: flags, and what to do after an error."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated

import typer

from sae_granary.common.app import expected_errors
from sae_granary.train.config.flags import Given

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Overwrite an existing run of this name.")]
Verify = Annotated[
    bool, typer.Option("--verify", help="First check the checksums of the files that the training reads.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
ReadFlags = Callable[[], Given]

NO_CACHE = "error: no cache was given; name its folder with --cache (sae-harvest run makes one)"


def errors(debug: bool) -> AbstractContextManager[None]:
    """The errors of all training commands, in one red line."""
    return expected_errors(
        debug,
        interrupted="interrupted: run the same command again, or sae-train resume <folder> if a run has begun",
        remedy="fix this, then run `sae-train resume`; committed work is safe",
    )
