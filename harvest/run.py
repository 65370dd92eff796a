"""A whole harvest: check, open the cache, load the model, run the pipeline, or continue an interrupted one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sae_granary.cache.format.records import existing_manifest
from sae_granary.cache.read.added import additions
from sae_granary.cache.write.writer import CacheWriter
from sae_granary.common.errors import ConfigError
from sae_granary.common.signals import StopRequest
from sae_granary.common.threads import shown, waiting
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.device.host import writing
from sae_granary.harvest.errors import HarvestError
from sae_granary.harvest.pipeline import Model, Pipeline
from sae_granary.harvest.plan import check_space
from sae_granary.harvest.prepare import Prepared, prepare
from sae_granary.harvest.progress import Progress, RunLog
from sae_granary.harvest.ranks.extension import NEW, begun_of
from sae_granary.harvest.ranks.work import Worker
from sae_granary.harvest.ranks.world import World, in_blocks, share_cores
from sae_granary.harvest.replay.stream import Replay, recorded_ends
from sae_granary.harvest.result import HarvestResult, result_of
from sae_granary.harvest.settings.make import make_config
from sae_granary.harvest.spec import as_begun, cache_spec, extended_provenance, grown, not_recorded
from sae_granary.models.behavior.checks import running
from sae_granary.models.blocks import choose_hooks
from sae_granary.models.device.compiled import compiled_blocks
from sae_granary.models.forward import hooked_model
from sae_granary.models.hooks import Hook, probe, probe_all
from sae_granary.models.load import load_base, model_record
from sae_granary.models.locate import check_weights
from sae_granary.models.pooled import TextModel, load_pooled, observe_pooled, pooled_width

if TYPE_CHECKING:
    from torch import nn


def harvest_activations(
    config: HarvestConfig | None = None, *, quiet: bool = False, stop: StopRequest | None = None, **settings: Any
) -> HarvestResult:
    """Stream text through a model and write its activations to a cache; again, continue one that was interrupted.

    Settings have the names that `sae-harvest config` prints (docs/parameters.md); a `config` replaces them all.
    Progress goes to standard error unless `quiet`. What can be checked without the model is checked before it loads.
    `stop` is asked between batches: a request raises Interrupted, and the same call continues. On a CPU the command
    also has malloc keep freed memory, which makes it faster (`common.process`).

    >>> from sae_granary import harvest_activations
    >>> result = harvest_activations(
    ...     model="demo", dataset="demo", layers=3, max_tokens=2_000, out="cache/new", device="cpu", quiet=True
    ... )
    >>> result.path.as_posix(), result.hooks, result.n_rows >= 2_000
    ('cache/new', (('layer_3', 384),), True)

    Raises:
        ConfigError: a setting is wrong.
        ModelError: a model, layer or module is missing or cannot be used.
        HarvestError: a dataset is missing or wrong, or there is no room; `harvest.errors` draws the tree.
        CacheError: `out` holds another harvest, or is damaged.
    """
    if config is not None and settings:
        raise ConfigError(f"a config and settings ({', '.join(settings)}) were given: give one of them")
    config = make_config(settings) if config is None else config
    stop, world = StopRequest() if stop is None else stop, World.of_environment()
    config, quiet = in_blocks(config, world), quiet or not world.tells
    with Progress(config.where.unit, config.max_tokens, quiet=quiet) as progress, shown(progress.say):
        with waiting("looking at model, tokenizer and text"):
            prepared = prepare(config, progress.say)
        check_weights(prepared.located)
        with waiting("estimating rows and bytes from the first documents"):
            check_space(prepared)
        share_cores(world, prepared.device)
        model: Model | None = None
        if not prepared.widths_known:
            prepared, model = load(prepared, progress.say)
        worked, extends = False, config.extend and asks_for_more(prepared)
        if config.block_docs is not None:
            begun = begun_of(prepared) if extends else NEW
            worked = Worker(prepared, cache_spec(prepared), progress, stop, world, begun).run(
                load, _tell_behavior, model
            )
        options = {**writing(prepared.device), "extend": extends and config.block_docs is None}
        with CacheWriter.open(config.out_path, cache_spec(prepared), **options) as writer:
            if writer.complete:
                return replace(_finished(prepared, writer), already_complete=not worked)
            return _fill(prepared, model, writer, progress, stop, extend=options["extend"])


def _fill(
    prepared: Prepared, model: Model | None, writer: CacheWriter, progress: Progress, stop: StopRequest, *, extend: bool
) -> HarvestResult:
    """Harvest the rest of a cache that is not in blocks; what happens goes to its log."""
    log = RunLog(writer.path)

    def say(message: str) -> None:
        progress.say(message)
        log.write(message)

    _say_what_is_there(writer, say, extend=extend)
    try:
        progress.say(f"loading {prepared.located.name} ({prepared.compute_dtype}, {prepared.device})")
        if model is None:
            prepared, model = load(prepared, say)
        _tell_behavior(prepared, writer)
        stop.defer()
        prepared = as_begun(prepared, writer.manifest.provenance)
        told = extended_provenance(prepared, writer.manifest) if extend else None
        replay = Replay(told, recorded_ends(writer.manifest))
        return Pipeline(prepared, model, writer, progress, log, stop.check, replay).run()
    except BaseException as error:
        log.write(f"stopped: {type(error).__name__}: {error}")
        raise
    finally:
        log.close(keep=writer.n_shards > 0)


def _say_what_is_there(writer: CacheWriter, say: Callable[[str], None], *, extend: bool) -> None:
    """Of a cache that is continued: its rows, and what they are not compared with or will not be followed by."""
    if writer.n_rows:
        say(f"continuing {writer.path} after {writer.n_rows:,} committed rows")
        if unknown := not_recorded(writer.manifest):
            say(f"warning: the cache was begun without a record of the {unknown}: that is not compared")
    for addition in additions(writer.path, writer.manifest) if extend else ():
        names = ", ".join(hook.name for hook in addition.manifest.hook_points)
        say(f"warning: {names}, added before, gets no further rows: run `sae-harvest add` again afterwards")


def load(prepared: Prepared, say: Callable[[str], None]) -> tuple[Prepared, Model]:
    """The model with its weights, and the plan with the widths that it really has."""
    located, device = prepared.located, prepared.device
    if prepared.unit == "text":
        pooled = load_pooled(located, prepared.compute_dtype, device)
        hooks: tuple[Hook, ...] = (replace(prepared.hooks[0], d_in=pooled_width(pooled)),)
        behavior = observe_pooled(pooled, prepared.batch_tokens)
        model: Model = TextModel(
            pooled, hooks[0].d_in, device, batch_tokens=prepared.batch_tokens, say=say, behavior=behavior
        )
    else:
        base = load_base(located, prepared.compute_dtype, device)
        hooks, sizes = _hooks_of(prepared, base), {"batch_tokens": prepared.batch_tokens}
        model = hooked_model(
            base, hooks, prepared.tokenizer, prepared.rules, device=device, name=located.name, say=say, **sizes
        )
        behavior = model.behavior
        located = replace(located, causal=located.is_decoder if behavior.causal is None else behavior.causal)
        if prepared.rules.separator is not None and not located.is_decoder:
            raise ConfigError(
                f"--pack joins documents for decoders; {located.name} reads in both directions and would attend across "
                "them: leave it out"
            )
        if prepared.config.model.compile:
            blocks = compiled_blocks(base, prepared.n_layers, hooks)
            say(f"compiling {len(blocks)} blocks, about a minute")
            model.compile(blocks, prepared.rules.ctx_len)
    if behavior.notice:
        say(f"{located.name}: {behavior.notice}")
    if prepared.widths_known and hooks != prepared.hooks:
        raise HarvestError(f"the loaded model has hook points {hooks}, its config promised {prepared.hooks}")
    return replace(prepared, located=located, hooks=hooks, widths_known=True, batching=behavior.batching), model


def _hooks_of(prepared: Prepared, base: nn.Module) -> tuple[Hook, ...]:
    """The hook points of a loaded model, with their widths; the model is left as it was."""
    chosen = prepared.hooks
    with running(base, prepared.located.name):
        if not prepared.widths_known:
            chosen = choose_hooks(base, prepared.n_layers, prepared.config.where, probe_all(base, prepared.device))
        return probe(base, chosen, prepared.device)


def _tell_behavior(prepared: Prepared, writer: CacheWriter) -> None:
    """Correct in the manifest what only the loaded model shows: whether a token sees later ones, and how it batches.

    Raises HarvestError where the committed rows came from other batches, and so were other rows.
    """
    told = dict(writer.manifest.provenance)
    begun = dict(told.get("compute") or {}).get("batching", "padded")
    if begun != prepared.batching and writer.n_rows:
        raise HarvestError(
            f"the rows of {writer.path} were computed in batches that are {begun}, but with {prepared.located.name} "
            f"only {prepared.batching} ones give what it computes for a text alone: harvest to another --out"
        )
    if begun != prepared.batching:
        told |= {"compute": dict(told.get("compute") or {}) | {"batching": prepared.batching}}
        writer.tell(told)
    found = model_record(prepared.located, prepared.model_class, prepared.n_layers)
    right = dict(told["model"]) | {name: found[name] for name in ("is_decoder", "family") if name in told["model"]}
    if right != told["model"]:
        writer.tell(told | {"model": right})


def _finished(prepared: Prepared, writer: CacheWriter) -> HarvestResult:
    """A harvest that is complete already: nothing to do, unless more is asked for than it holds."""
    if not prepared.config.extend and asks_for_more(prepared):
        asked = prepared.config.max_tokens
        raise ConfigError(
            f"{writer.path} is a complete harvest of {writer.n_rows:,} rows: add --extend to continue it "
            f"{f'up to {asked:,} rows' if asked else 'with more of its text'}; the rows that it holds stay as they are"
        )
    return replace(result_of(prepared, writer, writer.manifest.summary or {}), already_complete=True)


def asks_for_more(prepared: Prepared) -> bool:
    """Whether a complete cache was harvested less far than is asked for, and its text may have more."""
    config, have = prepared.config, existing_manifest(prepared.config.out_path)
    if have is None or have.summary is None:
        return False
    more_rows = config.max_tokens is None or config.max_tokens > sum(record.n_rows for record in have.shards)
    more_docs = config.max_docs is None or config.max_docs > int(have.summary.get("n_documents", 0))
    ended = have.summary.get("ended") == "source" and not (config.extend and grown(prepared, have))
    return more_rows and more_docs and not ended
