"""A run's view of its cache: the resolved config, the rows it reads, and their order."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sae_granary import sae_core
from sae_granary.cache.load.loader import PREVIOUS, WHOLE, Share, order_of
from sae_granary.cache.load.order import Order
from sae_granary.cache.load.origin import read_origin
from sae_granary.cache.load.selection import Counts, Part
from sae_granary.cache.read.added import shorter
from sae_granary.cache.read.reader import Cache
from sae_granary.common.device import choose_device
from sae_granary.common.errors import ConfigError
from sae_granary.models.language.language_model import EmbeddingModel, LanguageModel
from sae_granary.sae_core import Rows
from sae_granary.sae_core.kernels.deferred import FLOAT32_MAX
from sae_granary.sae_core.ranks.reduce import ALONE, Alone
from sae_granary.train.config.phases import first_context_step, needs_language_model
from sae_granary.train.config.resolve import resolve, resolve_hooks, selection_of, shuffle_of
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.data.cache_of_run import open_cache_of, open_pinned
from sae_granary.train.data.counts import counted
from sae_granary.train.state.identity import Identity
from sae_granary.train.state.initial import check_initial


@dataclass(frozen=True)
class RunData:
    """An opened cache and the resolved config of the run that reads it."""

    cache: Cache
    config: TrainConfig
    counts: Counts
    share: Share = WHOLE  # of every training batch, where ranks share them
    shards: Alone = ALONE  # ranks that the latents are divided over

    @classmethod
    def open(cls, config: TrainConfig, opened: Cache | None = None, known: dict[Any, Counts] | None = None) -> RunData:
        """Open the cache of an unresolved config and resolve it. Raises CacheError, ConfigError or SAEError.

        Configs of one cache may share the opened cache and what was counted in it (`known`, which is added to).
        """
        opened = open_cache_of(config) if opened is None else opened
        n_layers = opened.manifest.model.get("n_layers")
        # Added ones are named: what a command trains on does not change when more hook points are added to a cache.
        available = opened.hook_points if config.hook else (hook.name for hook in opened.manifest.hook_points)
        for name in config.hook:
            if lacks := shorter(name, opened.additions, opened.opened):
                raise ConfigError(f"{opened.path} has no hook point {name!r} for all of its rows{lacks}")
        hooks = resolve_hooks(config, tuple(available), n_layers)
        selection = selection_of(config)
        key = (selection, hooks if selection.filters.reads_norms else ())
        known = {} if known is None else known
        if key not in known:
            known[key] = counted(opened, selection, hooks)
        resolved = resolve(config, opened, hooks, known[key])
        check_initial(resolved)
        return cls(opened, resolved, known[key])

    @classmethod
    def reopen(cls, config: TrainConfig, record: Mapping[str, Any], opened: Cache | None = None) -> RunData:
        """Open the cache of a resolved config with the shards that were pinned when the run started.

        Runs of one record may share it (`opened`): each open cache holds a descriptor per shard that it maps.
        """
        choose_device(config.device)
        if opened is None:
            # An order of rows with the one before each does not count the first of a shard.
            before = int(sae_core.registry.get(config.type).reads.previous)
            shards = [(index, n_rows + before) for index, n_rows in record["order"]["shards"]]
            incomplete, by_shard = config.allow_incomplete, config.shuffle_shards is not None
            opened = open_pinned(config.cache, shards, allow_incomplete=incomplete, by_shard=by_shard)
        return cls(opened, config, Counts.from_json(record["counts"]))

    def with_config(self, config: TrainConfig) -> RunData:
        """The same data, as a run with other micro-batches reads it."""
        other = copy.copy(self)  # with what is cached in it: the order, the language model
        object.__setattr__(other, "config", config)
        return other

    def inputs(self, rows: Rows) -> Rows:
        """The SAE's inputs from a batch, which may hold more hook points."""
        return {name: rows[name] for name in self.input_names}

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the SAE's inputs: hook points, and for some types the previous row of each."""
        hooks = self.config.hook
        return (*hooks, *(hook + PREVIOUS for hook in hooks)) if self.reads_previous else hooks

    @cached_property
    def limits(self) -> dict[str, float]:
        """By input name: the largest harvested absolute value."""
        hooks = {name: name.removesuffix(PREVIOUS) for name in self.input_names}
        return {name: min(self.cache.moments(hook).largest, FLOAT32_MAX) for name, hook in hooks.items()}

    def width(self, name: str) -> int:
        """Width of the rows of an input."""
        return self.cache.hook_points[name.removesuffix(PREVIOUS)].d_in

    @cached_property
    def order(self) -> Order:
        """The order of the training rows, independent of other runs that share the loader."""
        config, shuffle = self.config, shuffle_of(self.config)
        return order_of(self.cache, config.hook, shuffle, batch_size=config.batch_size, previous=self.reads_previous)

    @property
    def stream_key(self) -> tuple[Any, ...]:
        """Runs with equal keys train on the same rows in the same batches: one loader can feed them all."""
        config, selection = self.config, selection_of(self.config).resolve(self.cache)
        hooks = config.hook if selection.filters.reads_norms else ()  # norms of other hook points drop other rows
        source = (config.cache, self.order, selection, hooks)
        return (*source, config.batch_size, config.device, self.reads_previous, first_context_step(config))

    @property
    def identity(self) -> Identity:
        """What checkpoints of this run belong to."""
        return Identity(dict(self.cache.manifest.fingerprint), self.order.to_json())

    @property
    def eval_part(self) -> Part:
        """The held-out part if there is one, else the training part."""
        return "heldout" if self.counts.heldout else "train"

    @cached_property
    def language_model(self) -> LanguageModel | EmbeddingModel | None:
        """The model of the cache with the hook point of this run, if the run goes through it.

        Raises ModelError or SelectionError; asked for before anything is written.
        """
        if not needs_language_model(self.config):
            return None
        from sae_granary.models.language.splice import open_any, open_model

        config = self.config
        opens = open_any if first_context_step(config) is None else open_model
        origin = read_origin(self.cache, config.hook[0])
        return opens(*origin, lm=config.lm, device=config.device, dtype=config.compute_dtype)

    @cached_property
    def reads_previous(self) -> bool:
        """Whether the type also reads the row before each row."""
        return sae_core.registry.get(self.config.type).reads.previous
