"""The cache as a run sees it: training batches, a sample to start from, rows to calibrate and to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sae_granary import sae_core
from sae_granary.cache.load.loader import PREVIOUS, Counts, Loader, LoaderState, order_of
from sae_granary.cache.load.order import Order
from sae_granary.cache.load.origin import read_origin
from sae_granary.cache.load.selection import Part, account
from sae_granary.cache.load.whole_contexts import Contexts, ContextsState, read_contexts
from sae_granary.cache.read.reader import Cache, open_cache
from sae_granary.common.device import choose_device
from sae_granary.models.language.language_model import EmbeddingModel, LanguageModel
from sae_granary.sae_core import Rows
from sae_granary.train.config.phases import first_window_step, needs_language_model
from sae_granary.train.config.resolve import filters_of, holdout_of, resolve, resolve_hooks
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.errors import ConfigError
from sae_granary.train.memory.capacity import check_logits
from sae_granary.train.state.checkpoint import Identity
from sae_granary.train.state.initial import check_initial

SAMPLE_ELEMENTS = 2**26  # numbers in the sample that normalisation and b_dec are fitted to
MAX_SAMPLE_ROWS = 2**20
CALIBRATION_ROWS = 2**17
EVALUATION_ROWS = 2**10  # in one pass through a language model: each predicts its whole vocabulary


@dataclass(frozen=True)
class RunData:
    """An opened cache and the resolved config of the run that reads it."""

    cache: Cache
    config: TrainConfig
    counts: Counts

    @classmethod
    def open(cls, config: TrainConfig, opened: Cache | None = None, known: dict[Any, Counts] | None = None) -> RunData:
        """Open the cache of an unresolved config and resolve it. Raises CacheError, ConfigError or SAEError.

        Configs of one cache may share the opened cache and what was counted in it (`known`, which is added to).
        """
        opened = open_cache(config.cache, allow_incomplete=config.allow_incomplete) if opened is None else opened
        n_layers = opened.manifest.provenance.get("model", {}).get("n_layers")
        hooks = resolve_hooks(config, tuple(opened.hook_points), n_layers)
        filters, holdout = filters_of(config), holdout_of(config)
        key = (filters, holdout, hooks if filters.reads_norms else ())
        known = {} if known is None else known
        if key not in known:
            known[key] = account(opened, filters, holdout, hooks)
        resolved = resolve(config, opened, hooks, known[key])
        check_initial(resolved)
        return cls(opened, resolved, known[key])

    @classmethod
    def reopen(cls, config: TrainConfig, record: Mapping[str, Any]) -> RunData:
        """Open the cache of a resolved config with the shards that were pinned when the run started."""
        choose_device(config.device, ConfigError)
        shards = [index for index, _ in record["order"]["shards"]]
        opened = open_cache(config.cache, shards=shards, allow_incomplete=config.allow_incomplete)
        return cls(opened, config, Counts(**record["counts"]))

    def batches(self, state: LoaderState | None = None) -> Loader:
        """Endless training batches on the run's device: rows by hook point, of which `inputs` takes the run's own."""
        return open_stream([self], state)

    def inputs(self, rows: Rows) -> Rows:
        """What this run's SAE reads of a batch, which may hold more hook points than it asked for."""
        return {name: rows[name] for name in self.input_names}

    @property
    def input_names(self) -> tuple[str, ...]:
        """What of a stream's rows the SAE reads: hook points, and for some types the rows before each."""
        hooks = self.config.hook
        return (*hooks, *(hook + PREVIOUS for hook in hooks)) if self.reads_previous else hooks

    def width(self, name: str) -> int:
        """Width of the rows under one of the input names."""
        return self.cache.hook_points[name.removesuffix(PREVIOUS)].d_in

    @cached_property
    def order(self) -> Order:
        """The order of the training rows: that of a loader of this run alone, whatever else is read beside it."""
        config = self.config
        assert config.shuffle_seed is not None
        return order_of(
            self.cache,
            config.hook,
            batch_size=config.batch_size,
            seed=config.shuffle_seed,
            pool_rows=config.pool_rows,
            block_rows=config.block_rows,
            previous=self.reads_previous,
        )

    @property
    def stream_key(self) -> tuple[Any, ...]:
        """Runs with equal keys train on the same rows in the same batches: one loader can feed them all."""
        config, filters = self.config, filters_of(self.config).resolve(self.cache)
        hooks = config.hook if filters.reads_norms else ()  # norms of other hook points drop other rows
        source = (config.cache, self.order, filters, holdout_of(config), hooks)
        return (*source, config.batch_size, config.device, self.reads_previous, first_window_step(config))

    @property
    def identity(self) -> Identity:
        """What checkpoints of this run belong to."""
        return Identity(dict(self.cache.manifest.fingerprint), self.order.to_json())

    def sample(self) -> Rows:
        """Rows that the run will train on, on the CPU: the first of its order. Non-finite rows are left out."""
        d_in = self.config.options["d_in"] * len(self.config.hook)
        n_rows = min(MAX_SAMPLE_ROWS, max(SAMPLE_ELEMENTS // d_in, 1024))
        with self._loader("train", batch_size=self.config.batch_size, epochs=1, device="cpu") as loader:
            parts = [batch.x for batch in _take_rows(loader, n_rows)]
        return finite_rows({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def calibration(self) -> Iterator[Rows]:
        """Training rows for `SAE.calibrate`, in micro-batches."""
        yield from self._pass("train", CALIBRATION_ROWS)

    @property
    def eval_part(self) -> Part:
        """Held-out rows if there are any."""
        return "heldout" if self.counts.heldout else "train"

    def evaluation(self) -> Iterator[Rows]:
        """Rows of the final evaluation, in micro-batches."""
        yield from self._pass(self.eval_part, self.config.eval_rows)

    @cached_property
    def language_model(self) -> LanguageModel | EmbeddingModel | None:
        """The model of the cache with the hook point of this run, if the run goes through it.

        Raises ModelError or SelectionError; asked for before anything is written.
        """
        if not needs_language_model(self.config):
            return None
        from sae_granary.models.language.splice import open_any, open_model

        config = self.config
        opens = open_any if first_window_step(config) is None else open_model
        origin = read_origin(self.cache, config.hook[0])
        return opens(*origin, lm=config.lm, device=config.device, dtype=config.compute_dtype)

    def check_language_model(self) -> None:
        """Load the model if the run goes through it, so that what is wrong with it is told before anything is spent.

        Raises ModelError, SelectionError, or ConfigError where its predictions do not fit the memory.
        """
        if isinstance(self.language_model, LanguageModel) and first_window_step(self.config) is not None:
            check_logits(self.config, self.language_model.vocab_size)

    def windows(self, state: ContextsState | None = None) -> Iterator[Contexts]:
        """Endless batches of whole windows to train on, shuffled in each epoch, of at most `batch_size` rows each."""
        return self._windows("train", self.config.batch_size, state=state, seed=self.order.seed)

    def evaluation_windows(self) -> Iterator[Contexts]:
        """The first windows of the part that is evaluated, in micro-batches, with about `downstream_rows` rows."""
        taken = 0
        size = min(self.config.batch_size // self.config.grad_acc_steps, EVALUATION_ROWS)
        for batch in self._windows(self.eval_part, size, epochs=1):
            yield batch
            taken += batch.n_rows
            if taken >= self.config.downstream_rows:
                return

    @cached_property
    def validation(self) -> list[Rows]:
        """Rows of the validations while training: the first of the final evaluation, kept in memory."""
        return list(self._pass(self.eval_part, min(self.config.val_rows, self.config.eval_rows)))

    def upcoming(self, state: LoaderState, n_rows: int) -> Iterator[Rows]:
        """Training rows from a state on, in batches; the stream that the run trains on does not move."""
        with self.batches(state) as loader:
            for batch in _take_rows(loader, n_rows):
                yield finite_rows(self.inputs(batch.x))

    @cached_property
    def reads_previous(self) -> bool:
        """Whether the type also reads the row before each row."""
        return sae_core.registry.get(self.config.type).reads.previous

    def _pass(self, part: Part, n_rows: int) -> Iterator[Rows]:
        size = self.config.batch_size // self.config.grad_acc_steps
        with self._loader(part, batch_size=size, epochs=1, device=self.config.device) as loader:
            for batch in _take_rows(loader, n_rows):
                yield finite_rows(batch.x)

    def _windows(self, part: Part, batch_rows: int, **options: Any) -> Iterator[Contexts]:
        filters, holdout = filters_of(self.config), holdout_of(self.config)
        hook = self.config.hook[0]
        return read_contexts(
            self.cache, hook, batch_rows=batch_rows, part=part, filters=filters, holdout=holdout, **options
        )

    def _loader(self, part: Part, *, batch_size: int, device: str, epochs: int) -> Loader:
        config = self.config
        assert config.shuffle_seed is not None
        return Loader(
            self.cache,
            config.hook,
            batch_size=batch_size,
            seed=config.shuffle_seed,
            device=device,
            filters=filters_of(config),
            part=part,
            holdout=holdout_of(config),
            epochs=epochs,
            pool_rows=config.pool_rows,
            block_rows=config.block_rows,
            previous=self.reads_previous,
            counts=self.counts,
        )


def open_stream(runs: Sequence[RunData], state: LoaderState | None = None) -> Loader:
    """One loader of endless training batches for runs of equal `stream_key`: the rows of all their hook points."""
    first, config = runs[0], runs[0].config
    return Loader(
        first.cache,
        list(dict.fromkeys(hook for run in runs for hook in run.config.hook)),
        batch_size=config.batch_size,
        seed=first.order.seed,
        device=config.device,
        filters=filters_of(config),
        holdout=holdout_of(config),
        state=state,
        previous=first.reads_previous,
        counts=first.counts,
        order=first.order,
    )


def finite_rows(x: Rows) -> Rows:
    """The rows that are finite at every hook point."""
    finite = torch.stack([torch.isfinite(t).all(1) for t in x.values()]).all(0)
    return x if bool(finite.all()) else {hook: t[finite] for hook, t in x.items()}


def _take_rows(loader: Loader, n_rows: int) -> Iterator[Any]:
    """Whole batches until n_rows are reached, at least one of them unless n_rows is 0."""
    taken = 0
    while taken < n_rows and (batch := next(loader, None)) is not None:
        taken += batch.n_rows
        yield batch


def export_metadata(data: RunData, folder: Path) -> dict[str, Any]:
    """What `cfg.json` says about where the SAE belongs."""
    model = data.cache.manifest.provenance.get("model", {})
    points = [data.cache.hook_points[name] for name in data.config.hook]
    metadata: dict[str, Any] = {
        "model_name": model.get("id"),
        "model_revision": model.get("revision"),
        "hook_name": ",".join(_saelens_hook(p.name) for p in points),
        "hf_hook_name": ",".join(p.module for p in points),
        "hook_points": [p.name for p in points],
        "cache_fingerprint": dict(data.cache.manifest.fingerprint),
        "run": folder.name,
    }
    return metadata


def _saelens_hook(name: str) -> str:
    """layer_6 -> blocks.6.hook_resid_post, as SAELens and TransformerLens call it; others keep their name."""
    layer = name.removeprefix("layer_")
    return f"blocks.{layer}.hook_resid_post" if layer.isdigit() else name
