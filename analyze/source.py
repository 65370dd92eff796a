"""An SAE together with the cache it encodes: the hook points it reads, and the identity of both.

Shapes: N rows, D = d_in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sae_granary import sae_core
from sae_granary.analyze.errors import CacheGoneError, MismatchError
from sae_granary.cache.errors import CorruptCacheError
from sae_granary.cache.format.records import load_manifest
from sae_granary.cache.opening import open_cache
from sae_granary.cache.read.reader import Cache
from sae_granary.cache.read.recorded import PATHS, find_recorded
from sae_granary.cache.remote.stage import stage, stage_folder
from sae_granary.common.device import choose_device
from sae_granary.common.errors import ConfigError
from sae_granary.common.finished_run import RECORD, read_metadata, read_record
from sae_granary.common.signed import digest
from sae_granary.sae_core import SAE, Codes
from sae_granary.sae_core.data import hook_widths
from sae_granary.sae_core.files.disk import checksum_of


@dataclass(frozen=True)
class Source:
    """A loaded SAE and an open cache that match."""

    folder: Path
    sae: SAE
    cache: Cache
    hooks: tuple[str, ...]  # in the order in which the SAE reads them
    sae_hash: str

    @property
    def identity(self) -> dict[str, Any]:
        """Identifies codes of this SAE and cache."""
        return {
            "sae": self.sae_hash,
            "cache": dict(self.cache.manifest.fingerprint),
            "shards": [[shard.index, shard.n_rows] for shard in self.cache.shards],
            "hooks": list(self.hooks),
        }

    @property
    def place(self) -> Path:
        """Where results for this cache are stored by default: `analysis/<key of the cache>` in the SAE's folder."""
        told = {name: value for name, value in self.identity.items() if name != "sae"}
        return self.folder / "analysis" / digest(json.dumps(told, sort_keys=True).encode())[:12]

    def stage(self) -> None:
        """Read the rows from copies from now on, in the folder of `--stage` if there is one. Raises as `stage` does."""
        if stage_folder() is not None:
            stage(self.cache, list(self.cache.files_of(self.hooks)))

    @torch.no_grad()
    def encode(self, start: int, stop: int) -> Codes:
        """The codes of rows start..stop of the cache. Raises CorruptCacheError for a NaN or Inf among them."""
        rows = {name: self.cache.hook(name)[start:stop] for name in self.hooks}
        for name, values in rows.items():
            found = self.cache.storage.decoded.first_non_finite(values)
            if found is not None:
                raise damaged_row(self.cache, name, start + found // values.shape[1])
        return self.sae.encode(rows)


def damaged_row(cache: Cache, hook: str, row: int) -> CorruptCacheError:
    """The error for NaN or Inf in a row of a cache."""
    return CorruptCacheError(
        f"{cache.path}: hook point {hook}, row {row:,} holds NaN or Inf, which is never harvested; "
        "find the damage with `sae-cache verify`"
    )


def open_source(
    sae: str | Path,
    cache: str | Path | None = None,
    *,
    hooks: Sequence[str] = (),
    device: str = "auto",
    allow_incomplete: bool = False,
) -> Source:
    """Load an SAE (any that `load_sae` reads) and open a cache for it; by default the cache it was trained on.

    Without `hooks`, the SAE's record names its hook points; an SAE without a record reads the cache's only one. Raises
    MismatchError with both sides if hook points, widths or models differ, SAEError, CacheError, ConfigError.
    """
    folder, chosen = Path(sae), choose_device(device)
    loaded = sae_core.load(folder, chosen)
    opened = open_cache(cache_of(folder) if cache is None else cache, allow_incomplete=allow_incomplete)
    metadata = read_metadata(folder)
    names = tuple(hooks) or tuple(metadata.get("hook_points") or ()) or (opened.hook_name(),)
    check_fit(folder, loaded, metadata, opened, names)
    return Source(folder, loaded, opened, names, hash_of(loaded))


def cache_of(folder: Path) -> Path:
    """The cache that a run was trained on, by its record, also where the two moved together.

    Raises ConfigError where the record names none or it is gone, MismatchError where another one is in its place.
    """
    if not (folder / RECORD).is_file():
        raise ConfigError(
            f"{folder} does not record its cache, because it is not a run of sae-train; name it: --cache FOLDER"
        )
    record = read_record(folder)
    if (found := find_recorded(record, folder)) is not None:
        return Path(found)
    stored = (record.get(PATHS) or {}).get("absolute")
    if stored is None:
        raise CacheGoneError(
            f"{folder / RECORD} does not record where its cache is: name it: --cache FOLDER, or the URL whose "
            "shards were trained on while they were fetched"
        )
    if not Path(stored).exists():
        raise CacheGoneError(f"the cache of {folder} is not at {stored} any more: name its place: --cache FOLDER")
    load_manifest(Path(stored))  # says what is wrong with one that cannot be read
    raise MismatchError(
        f"{stored} is another cache than the one that {folder} was trained on: name one: --cache FOLDER"
    )


def check_fit(folder: Path, sae: SAE, metadata: Mapping[str, Any], cache: Cache, hooks: Sequence[str]) -> None:
    """Raise MismatchError if a cache does not hold what an SAE reads."""
    there = ", ".join(f"{name} ({point.d_in})" for name, point in cache.hook_points.items())
    if missing := [name for name in hooks if name not in cache.hook_points]:
        raise MismatchError(
            f"{folder} reads hook point {missing[0]!r}, {cache.path} holds {there}; give its own cache, or --hook"
        )
    wanted = hook_widths(sae)
    if len(hooks) != len(wanted):
        raise MismatchError(
            f"{folder} ({sae.type_name}) reads {len(wanted)} hook points, got {len(hooks)}: {', '.join(hooks)}; "
            f"{cache.path} holds {there}"
        )
    for name, width in zip(hooks, wanted, strict=True):
        if cache.hook_points[name].d_in != width:
            raise MismatchError(
                f"{folder} reads rows of width {width}, hook point {name!r} of {cache.path} has width "
                f"{cache.hook_points[name].d_in}; give the cache that it was trained on, or another --hook"
            )
    trained, here = metadata.get("cache_fingerprint") or {}, cache.manifest.fingerprint
    key = "weights_xxh3" if "weights_xxh3" in trained and "weights_xxh3" in here else "model"
    if trained.get(key, here.get(key)) != here.get(key, trained.get(key)):
        raise MismatchError(
            f"{folder} was trained on rows of {trained.get('model')} ({key} {trained[key]}), {cache.path} holds "
            f"rows of {here.get('model')} ({key} {here[key]}); harvest the model of the SAE"
        )


def hash_of(sae: SAE) -> str:
    """SHA-256 of an SAE's type, options, weights and buffers, in hexadecimal; the same for files of any format."""
    told = json.dumps([sae.type_name, asdict(sae.config)], sort_keys=True, default=str)
    weights = checksum_of({name: t.detach().cpu() for name, t in sae.state_dict().items()})
    return hashlib.sha256(f"{told}\n{weights}".encode()).hexdigest()
