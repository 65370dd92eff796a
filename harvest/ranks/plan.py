"""What all processes of a harvest must have in common beside what determines the rows."""

from __future__ import annotations

from pathlib import Path

from sae_granary import __version__
from sae_granary.cache.errors import CacheMismatchError
from sae_granary.cache.format.manifest import Manifest
from sae_granary.cache.format.spec import CacheSpec
from sae_granary.common.files import write_first
from sae_granary.common.signed import Fields, sign
from sae_granary.harvest.config import HarvestConfig

_PLAN = "plan.json"


def agree(path: Path, folder: Path, config: HarvestConfig, begun: Manifest, spec: CacheSpec) -> None:
    """Raise CacheMismatchError where this process wants another extent, or has other libraries, than the first one."""
    wants = {"max_tokens": config.max_tokens, "max_docs": config.max_docs, "sae-granary": __version__}
    place = folder / _PLAN
    if not place.exists():
        write_first(place, sign(wants))
    have = Fields.of_file(place, "remove it, and run the same command again", signed_since=1).body
    differing = {name: (have.get(name), want) for name, want in wants.items() if have.get(name) != want}
    ours, theirs = spec.provenance["versions"], begun.provenance.get("versions") or {}
    differing |= {name: (theirs.get(name), ours[name]) for name in ours if theirs.get(name) != ours[name]}
    if differing:
        raise CacheMismatchError(path, differing, f"{path}_2")
