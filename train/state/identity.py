"""What a checkpoint belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_granary.train.errors import CheckpointError


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to; a resume with anything else is refused."""

    cache: Mapping[str, Any]  # the cache's fingerprint
    order: Mapping[str, Any]  # the loader's order: shards, block size, pool size, seed


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Compare what a checkpoint belongs to with what there is. Raises CheckpointError with the first differences."""
    saved, now = json.loads(json.dumps(saved)), json.loads(json.dumps(now))
    differences = [
        f"{part}.{key}: checkpoint {saved[part].get(key)!r}, now {now[part].get(key)!r}"
        for part in ("cache", "order")
        for key in sorted({*saved[part], *now[part]})
        if saved[part].get(key) != now[part].get(key)
    ]
    if differences:
        raise CheckpointError(
            f"{path} belongs to another cache or order of rows: {'; '.join(differences[:4])}; "
            "name its own cache with --cache, or train a new run on this one"
        )
