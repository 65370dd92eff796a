"""From settings to a resolved config: what depends on the cache and on the run's length is decided here, once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_granary import sae_core
from sae_granary.cache.load.plan import Shuffle
from sae_granary.cache.load.selection import Counts, Filters, Holdout, Part, Selection
from sae_granary.cache.remote.store import is_url
from sae_granary.common.device import choose_device
from sae_granary.common.errors import ConfigError, nearest
from sae_granary.train.config.phases import check_phases, first_context_step
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.optim import schedule

if TYPE_CHECKING:
    from sae_granary.cache.read.reader import Cache

DEFAULT_EXPANSION = 8
# Options of a variant that follow from the cache or the run's length unless they are given.
DERIVED_OPTIONS = ("d_in", "d_sae", "n_hooks", "d_out", "dead_after_tokens")
MIN_STEPS, MAX_EPOCHS = 1000, 16  # a default run passes a small cache several times


def selection_of(config: TrainConfig, part: Part = "train") -> Selection:
    """The rows of the cache that a run reads."""
    filters = Filters(
        special=config.keep_special,
        first_position=config.keep_first_position,
        min_position=_min_position(config),
        max_position=config.max_position,
        min_norm=config.min_norm,
        max_norm=config.max_norm,
        exclude_tokens=config.exclude_tokens,
    )
    return Selection(filters, Holdout(config.holdout, config.holdout_seed), part)


def shuffle_of(config: TrainConfig) -> Shuffle:
    """How a run's rows are shuffled."""
    assert config.shuffle_seed is not None
    return Shuffle(config.shuffle_seed, config.pool_rows, config.block_rows, config.shuffle_shards)


def _min_position(config: TrainConfig) -> int | None:
    """A type that reads neighbors starts at position 2: before it stands a token of the text, not [CLS] or BOS."""
    if not sae_core.registry.get(config.type).reads.previous:
        return config.min_position
    return max(config.min_position or 0, 2)


def resolve_hooks(config: TrainConfig, available: Sequence[str], n_layers: int | None = None) -> tuple[str, ...]:
    """The hook points to train on: those named, or the only one there is, or what a type that reads several prefers."""
    cls = sae_core.registry.get(config.type)
    several = cls.reads.several
    for name in config.hook:
        if name not in available:
            raise ConfigError(
                f"the cache has no hook point {name!r} (it has: {', '.join(available)}){nearest(name, available)}"
            )
    known = n_layers if isinstance(n_layers, int) else None
    alone = tuple(available) if len(available) == 1 else ()
    preferred = cls.reads.default_hooks(available, known) if several else alone
    hooks = config.hook or preferred
    if not hooks:
        raise ConfigError(f"the cache has {len(available)} hook points, choose one with --hook: {', '.join(available)}")
    if several and len(hooks) < 2:
        raise ConfigError(
            f"type {config.type} reads at least 2 hook points, got {len(hooks)}: {', '.join(hooks)}; harvest more "
            "(sae-harvest run --layer 2,4) and name them with --hook"
        )
    if len(hooks) > 1 and not several:
        raise ConfigError(
            f"type {config.type} reads one hook point, got {len(hooks)}: {', '.join(hooks)}; name one with --hook, or "
            f"train an SAE of each: sae-train sweep --grid hook={','.join(hooks)}"
        )
    most = next((spec.metadata["le"] for spec in fields(cls.Config) if spec.name == "n_hooks"), None)
    if most is not None and len(hooks) > most:
        raise ConfigError(
            f"type {config.type} reads {most} hook points, got {len(hooks)}: {', '.join(hooks)}; name {most} with "
            "--hook, in the order in which the type reads them"
        )
    return hooks


def resolve(config: TrainConfig, cache: Cache, hooks: tuple[str, ...], counts: Counts) -> TrainConfig:
    """Decide every undecided setting. Raises ConfigError or OptionError for what cannot be; changes nothing on disk."""
    if sae_core.registry.get(config.type).reads.previous and cache.unit == "text":
        raise ConfigError(
            f"type {config.type} ties each token to the one before it, but {cache.path} holds one row per text: "
            "harvest tokens (sae-harvest run --unit token), or choose another --type"
        )
    if counts.train < config.batch_size:
        raise ConfigError(
            f"batch_size={config.batch_size:,} is larger than the {counts.train:,} rows to train on "
            f"({counts.total:,} in the cache, {counts.heldout:,} held out, the rest filtered); "
            "use a smaller --batch-size or harvest more"
        )
    cls = sae_core.registry.get(config.type)
    known = {f.name for f in fields(cls.Config)}
    widths = _widths(cache, hooks, input_and_output="d_out" in known)
    d_in = widths[0]
    if config.options.get("d_in", d_in) != d_in:
        raise ConfigError(f"d_in={config.options['d_in']}: hook point {hooks[0]} of the cache has width {d_in}")
    d_sae = config.options.get("d_sae")
    if d_sae is None:
        d_sae = round(d_in * (config.expansion_factor or DEFAULT_EXPANSION))
    n_steps = n_steps_of(config, counts.train)
    options = {**config.options, "d_in": d_in, "d_sae": d_sae}
    if "n_hooks" in known:
        options["n_hooks"] = len(hooks)
    if "d_out" in known:
        options["d_out"] = widths[-1]
    if "dead_after_tokens" not in config.options:
        options["dead_after_tokens"] = schedule.default_dead_after(n_steps * config.batch_size, config.batch_size)
    variant = sae_core.make_config(cls, options)
    warmup = schedule.default_warmup(n_steps) if config.warmup_steps is None else config.warmup_steps
    if warmup >= n_steps and warmup > 0:
        raise ConfigError(f"warmup_steps={warmup} is not shorter than the run of {n_steps} steps")
    resolved = replace(
        config,
        hook=hooks,
        cache=config.cache if is_url(config.cache) else str(cache.path),  # a URL: each machine has a copy
        device=choose_device(config.device),
        compute_dtype="float32" if config.compute_dtype == "auto" else config.compute_dtype,
        shuffle_seed=config.seed if config.shuffle_seed is None else config.shuffle_seed,
        init_seed=config.seed if config.init_seed is None else config.init_seed,
        expansion_factor=None,
        steps=n_steps,
        tokens=None,
        epochs=None,
        lr=config.lr or schedule.default_lr(int(variant.d_sae), n_steps),
        warmup_steps=warmup,
        keep_first_position=selection_of(config).resolve(cache).filters.first_position,
        options={f.name: getattr(variant, f.name) for f in fields(variant)},
    )
    check_phases(resolved)
    downstream = first_context_step(resolved) is not None if config.eval_downstream is None else config.eval_downstream
    return replace(resolved, name=config.name or default_name(resolved), eval_downstream=downstream)


def n_steps_of(config: TrainConfig, n_rows: int) -> int:
    """Optimizer steps of a run over n_rows training rows per epoch."""
    if config.steps is not None:
        return config.steps
    if config.tokens is not None:
        return max(config.tokens // config.batch_size, 1)
    if config.epochs is not None:
        return max(int(config.epochs * n_rows) // config.batch_size, 1)
    per_epoch = n_rows // config.batch_size
    return max(per_epoch, min(MIN_STEPS, MAX_EPOCHS * n_rows // config.batch_size), 1)


def default_name(config: TrainConfig) -> str:
    """A deterministic name from what people vary: cache, hook point, type, width, k, seeds."""
    hooks = config.hook[0] if len(config.hook) == 1 else f"{len(config.hook)}hooks"
    parts: list[Any] = [Path(config.cache).name, hooks, config.type, f"d{config.options['d_sae']}"]
    if "k" in config.options:
        parts.append(f"k{config.options['k']}")
    if first_context_step(config) is not None:
        parts.append("klft" if config.finetune_kl else config.options["loss"])
    seeds = (config.shuffle_seed, config.init_seed)
    parts.append(f"s{config.init_seed}" if seeds[0] == seeds[1] else f"s{seeds[1]}-o{seeds[0]}")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(str(p) for p in parts))


def _widths(cache: Cache, hooks: Sequence[str], *, input_and_output: bool) -> list[int]:
    """Widths of the hook points, equal unless a type reads one and writes another."""
    widths = [cache.hook_points[hook].d_in for hook in hooks]
    if len(set(widths)) > 1 and not input_and_output:
        listed = ", ".join(f"{hook} {d}" for hook, d in zip(hooks, widths, strict=True))
        raise ConfigError(f"hook points of one SAE must have equal widths, got {listed}")
    return widths
