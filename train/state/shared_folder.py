"""A folder that several ranks write together, each its part of the latents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_granary.common import files
from sae_granary.common.files import hash_files
from sae_granary.sae_core.files.sharded import part_of
from sae_granary.sae_core.ranks.reduce import Alone


@contextmanager
def shared_folder(path: Path, shards: Alone) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block has succeeded on all ranks (`files.new_folder`)."""
    if shards.index == 0:
        with files.new_folder(path) as temp:
            shards.all(True)  # there is a folder to write to
            yield temp
    else:
        shards.all(True)
        yield path.with_name(f"{files.TEMP_PREFIX}{path.name}")
    shards.all(True)


def hashes_of_all(folder: Path, shards: Alone) -> dict[str, str]:
    """The hashes of all files by name, when every rank has written its own; rank 0 also hashes those without parts."""
    own = [p for p in sorted(folder.rglob("*")) if p.is_file() and (part_of(p.name) or (0, 1))[0] == shards.index]
    found = {str(p.relative_to(folder)): hash_files([p]) for p in own}
    return {name: value for text in shards.texts(json.dumps(found)) for name, value in json.loads(text).items()}
