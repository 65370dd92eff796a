"""What the commands share: flags, and what to do after an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from sae_granary.common.app import expected_errors
from sae_granary.train.config.flags import Given
from sae_granary.train.ranks.place import place_of_process

if TYPE_CHECKING:
    from sae_granary.common.signals import StopRequest

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Overwrite an existing run of this name.")]
Verify = Annotated[
    bool, typer.Option("--verify", help="First check the checksums of the files that the training reads.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Stage = Annotated[
    str | None,
    typer.Option(
        "--stage",
        help="Folder on a disk of this machine: what is read of the cache is copied there once, checked and read. "
        "(default: GRANARY_STAGE, else no copy)",
        show_default=False,
    ),
]
ReadFlags = Callable[[], Given]

NO_CACHE = "no cache was given; name its folder with --cache (sae-harvest run makes one)"


@contextmanager
def errors(debug: bool, stage: str | None = None) -> Iterator[None]:
    """The errors of all training commands, in one red line; `stage` is the folder of --stage."""
    told = expected_errors(
        debug,
        interrupted="interrupted: run the same command again, or sae-train resume <folder> if a run has begun",
        remedy="fix this, then run `sae-train resume`; committed work is safe",
    )
    with told:
        if stage is None:
            yield
            return
        from sae_granary.cache.remote.stage import staging

        with staging(stage):
            yield


@contextmanager
def working(device: str, say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Set the process up to train on a device; yields what a signal sets. `say` gets a line about each long wait."""
    from sae_granary.cache.read.arrays import truncated_shards
    from sae_granary.common.process import tuned_process
    from sae_granary.common.signals import explain_bus_errors, stop_on_signals
    from sae_granary.common.threads import shown

    explain_bus_errors(truncated_shards)
    with tuned_process(device), stop_on_signals(at_once=True) as stop, shown(say):
        yield stop


def follows() -> bool:
    """Whether this is a rank other than 0, which alone reports."""
    place = place_of_process()
    return place is not None and not place.leads
