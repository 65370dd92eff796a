"""`sae-cache convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sae_granary.cache.commands.shared import CachePath, console, plain, progress_bar
from sae_granary.cache.format.storage import STORAGE
from sae_granary.common.app import Debug, expected_errors

Target = Annotated[Path, typer.Argument(help="Folder of the new cache.", show_default=False)]
Dtype = Annotated[str, typer.Option("--dtype", help=f"{', '.join(STORAGE)}.", show_default=False)]


def convert(source: CachePath, target: Target, dtype: Dtype, debug: Debug = False) -> None:
    """Store a cache again in another dtype, e.g. int8 at half the size of bfloat16. Run it again to continue."""
    with expected_errors(debug, interrupted="interrupted: run the same command again to continue"):
        from sae_granary.cache import convert as conversion
        from sae_granary.cache.read.arrays import truncated_shards
        from sae_granary.cache.read.render import error_lines
        from sae_granary.common.quantities import byte_size
        from sae_granary.common.signals import explain_bus_errors

        explain_bus_errors(truncated_shards)
        err = console(stderr=True)
        with progress_bar("converting") as tell:
            made = conversion.convert(
                source, target, dtype, progress=tell, say=lambda message: err.print(plain(message), soft_wrap=True)
            )
        before = str(made.manifest.fingerprint[conversion.CONVERTED]).rpartition(", ")[2]
        exact = "exactly" if conversion.is_exact(before, dtype) else "rounded"
        told = [f"{made.n_rows:,} rows, {byte_size(made.n_bytes)}, {exact} from {before}"]
        told += [f"{k} {v}" for k, v in error_lines({name: made.stats(name) for name in made.hook_points}).items()]
        console().print(plain(f"{target}: {'; '.join(told)}; verified"), soft_wrap=True)
