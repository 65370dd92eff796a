"""Add hook points to a complete cache: the same text through the same model, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sae_granary.cache.format.layout import ADDED
from sae_granary.cache.format.spec import CacheSpec
from sae_granary.cache.read.reader import Cache, open_local
from sae_granary.cache.write.session import locked
from sae_granary.common.errors import ConfigError
from sae_granary.common.signals import StopRequest
from sae_granary.harvest.device.host import writing
from sae_granary.harvest.pipeline import Model, Pipeline
from sae_granary.harvest.prepare import Prepared, Say, prepare
from sae_granary.harvest.progress import Progress, RunLog
from sae_granary.harvest.ranks.blocks import Records, begin_of
from sae_granary.harvest.replay.growth import check_addition_space
from sae_granary.harvest.replay.in_blocks import ends_of, of_block, unfinished_blocks
from sae_granary.harvest.replay.on_rows import AddingWriter
from sae_granary.harvest.replay.recorded import recorded_config, refuse_other_batching, refuse_other_source
from sae_granary.harvest.replay.stream import Replay, recorded_ends
from sae_granary.harvest.result import HarvestResult, result_of
from sae_granary.harvest.run import load
from sae_granary.harvest.spec import as_begun, cache_spec
from sae_granary.models.config import WhereConfig
from sae_granary.models.locate import check_weights

_MAX_HOOKS_IN_NAME = 4


def add_hooks(
    to: str | Path,
    where: WhereConfig,
    *,
    model: str | None = None,
    dataset: str | None = None,
    device: str | None = None,
    quiet: bool = False,
    stop: StopRequest | None = None,
) -> HarvestResult:
    """Harvest more hook points of the model of a complete cache onto its rows, or continue where that was interrupted.

    The recorded text goes through the recorded model in the recorded batches, and each row is compared with the stored
    one. `model` and `dataset` say where these are now, if they were moved. Of a cache that was extended since, only the
    new rows are harvested. Readers see the hook points once they have all rows.

    Raises ConfigError for hook points that are there, ModelError for a layer that the model lacks, HarvestError where
    model, text or settings differ from the record, RowsDifferError at the first row that differs, CacheError.
    """
    stop = StopRequest() if stop is None else stop
    places = {"model": model, "dataset": dataset, "device": device}
    with Progress("token", None, quiet=quiet) as progress:
        base, prepared = prepare_addition(to, where, places, progress.say)
        path, names, place = base.path, [hook.name for hook in prepared.hooks], prepared.config.out_path
        check_addition_space(base, prepared)
        spec = _spec(prepared, base)
        options = {**writing(prepared.device), "extend": True}
        with locked(path), AddingWriter.open(place, spec, **options) as writer:
            assert isinstance(writer, AddingWriter)
            writer.on(base)
            if writer.manifest.complete and writer.n_rows == base.n_rows:
                done = result_of(prepared, writer, base.manifest.summary or {})
                return replace(done, already_complete=True)
            log = RunLog(path)
            if writer.n_rows:
                progress.say(f"continuing {', '.join(names)} after {writer.n_rows:,} of {base.n_rows:,} rows")
            try:
                progress.say(f"loading {prepared.located.name} ({prepared.compute_dtype}, {prepared.device})")
                prepared, loaded = load(prepared, progress.say)
                refuse_other_batching(base.manifest, prepared)
                stop.defer()
                prepared = as_begun(prepared, base.manifest.provenance)
                ends = recorded_ends(base.manifest)
                log.write(f"adding {', '.join(names)}")
                if base.manifest.block_docs is not None:
                    _add_blocks(prepared, loaded, writer, progress, log, stop)
                    return result_of(prepared, writer, base.manifest.summary or {})
                return Pipeline(prepared, loaded, writer, progress, log, stop.check, Replay(None, ends)).run()
            except BaseException as error:
                log.write(f"stopped: {type(error).__name__}: {error}")
                raise
            finally:
                log.close(keep=True)


def _add_blocks(
    prepared: Prepared, loaded: Model, writer: AddingWriter, progress: Progress, log: RunLog, stop: StopRequest
) -> None:
    """Harvest the hook points onto the rows of a cache in blocks, block by block."""
    text, docs = Records(prepared.source), prepared.config.block_docs
    assert docs is not None
    for block, rows in unfinished_blocks(writer):
        part = of_block(prepared, text, writer.base.records, block)
        replay = Replay(ends=ends_of(writer.base.manifest, block), begin=begin_of(block, docs))
        Pipeline(part, loaded, rows, progress, log, stop.check, replay).fill()
    writer.finish({})
    log.write(f"finished: {writer.n_rows:,} rows")


def prepare_addition(
    to: str | Path, where: WhereConfig, places: Mapping[str, str | None], say: Say
) -> tuple[Cache, Prepared]:
    """Check an addition without loading weights: the cache, and what is harvested onto it. Raises as `add_hooks`.

    `places` are where `model` and `dataset` are now, and the `device`; None for what the cache records.
    """
    base = open_local(to)
    path = base.path
    if base.manifest.unit != "token":
        raise ConfigError(f"{path} holds one row per text: layers are added to caches of one row per token only")
    out = path / ADDED / "new"  # until the hook points are known
    config = recorded_config(path, base.manifest, where, out, **places)
    prepared = replace(prepare(config, say), recorded_buffer=int(base.manifest.fingerprint["buffer_tokens"]))
    check_weights(prepared.located)
    refuse_other_source(path, prepared, base.manifest)
    names = [hook.name for hook in prepared.hooks]
    if there := [hook.name for hook in base.manifest.hook_points if hook.name in names]:
        raise ConfigError(f"{path} was harvested with hook point {there[0]}: name others with --layer or --hook")
    return base, replace(prepared, config=replace(config, out=_place(base, names)))


def _place(base: Cache, names: list[str]) -> Path:
    """The folder of these hook points. Raises ConfigError where some of them were added with others."""
    for addition in base.additions:
        have = [hook.name for hook in addition.manifest.hook_points]
        if have == names:
            return addition.path
        if twice := [name for name in names if name in have]:
            state = "was added to" if addition.manifest.complete else "is being added to"
            raise ConfigError(f"{twice[0]} {state} {base.path} with {', '.join(have)}: name all of these, or others")
    shown = "+".join(names[:_MAX_HOOKS_IN_NAME]) + (f"+{len(names)}" if len(names) > _MAX_HOOKS_IN_NAME else "")
    return base.path / ADDED / shown[:200]


def _spec(prepared: Prepared, base: Cache) -> CacheSpec:
    """The cache of the added hook points: of the same rows, by the fingerprint of the one that they are added to."""
    told = {**base.manifest.fingerprint, "hook_points": ", ".join(hook.name for hook in prepared.hooks)}
    spec = cache_spec(prepared)
    return replace(
        spec, fingerprint=told, vocabulary=None, inner_chunk_bytes=base.manifest.inner_chunk_bytes,
        provenance={**base.manifest.provenance, "versions": spec.provenance["versions"]},
    )  # fmt: skip
