"""Everything that can be known before weights are loaded: model, hook points, source, windows, sizes, fingerprint."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sae_granary.cache.format.layout import CacheLayout, cache_layout, default_rows_per_shard
from sae_granary.cache.format.storage import STORAGE
from sae_granary.common.device import choose_device
from sae_granary.common.errors import ConfigError
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.settings.out_folder import check_out
from sae_granary.harvest.text.document import TextSource
from sae_granary.harvest.text.sources import open_source
from sae_granary.models.blocks import choose_hooks
from sae_granary.models.device.compiled import check_compile
from sae_granary.models.hooks import Hook
from sae_granary.models.load import (
    choose_compute_dtype,
    flops_per_token,
    guess_widths,
    max_positions,
    n_layers,
    probe_skeleton,
    run_skeleton,
    skeleton,
)
from sae_granary.models.locate import SENTENCE_TRANSFORMER, Located, inner_transformer, locate
from sae_granary.models.online import quiet
from sae_granary.models.pooled import BUFFER_TEXTS, TEXT_RULES, pooled_hook, pretend_tokens
from sae_granary.models.tokens.contexts import Tokenize, WindowRules
from sae_granary.models.tokens.document import Render, join_chat
from sae_granary.models.tokens.tokenizer import chat_renderer, load_tokenizer, text_tokenizer, window_rules
from sae_granary.models.tokens.vocabulary import checked

if TYPE_CHECKING:
    from torch import nn

BATCH_TOKENS = {"cuda": 16384, "cpu": 4096}
BATCHES_PER_BUFFER = 16  # enough to find windows of like length; the last buffer is written while no model runs
BUFFER_BYTES = 512 << 20  # of activations; up to three buffers are alive at once
SHARD_BYTES = 512 << 20  # of activations at the widest hook point
DEFAULT_CTX_LEN = 512

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """A checked harvest."""

    config: HarvestConfig
    located: Located
    hooks: tuple[Hook, ...]
    widths_known: bool  # False: only the loaded model tells them
    n_layers: int | None
    model_class: str | None
    source: TextSource
    tokenizer: Any
    rules: WindowRules
    tokenize: Tokenize
    render: Render
    device: str
    compute_dtype: str
    batch_tokens: int
    flops_per_token: float = 0.0  # of the blocks up to the last hook point
    batching: str = "padded"  # of the loaded model: `Behavior.batching`
    recorded_buffer: int | None = None  # rows of a sort buffer of the cache whose rows come again

    @property
    def unit(self) -> str:
        """token or text."""
        return self.config.where.unit

    @property
    def dtype(self) -> str:
        """Stored number format."""
        return self.compute_dtype if self.config.dtype == "auto" else self.config.dtype

    @property
    def bytes_per_row(self) -> int:
        """Of the activations of all hook points, as the model computes them."""
        return sum(hook.d_in for hook in self.hooks) * STORAGE[self.compute_dtype].item_bytes

    @property
    def buffer_tokens(self) -> int:
        """Rows that are sorted together."""
        if self.recorded_buffer is not None:
            return self.recorded_buffer
        if self.unit == "text":
            return BUFFER_TEXTS
        by_memory = BUFFER_BYTES // max(1, self.bytes_per_row)
        return max(self.batch_tokens, min(BATCHES_PER_BUFFER * self.batch_tokens, by_memory))

    @property
    def rows_per_shard(self) -> int:
        """A power of two near SHARD_BYTES, at least a window."""
        wanted = self.config.rows_per_shard
        if wanted is None:
            wanted = default_rows_per_shard(max(hook.d_in for hook in self.hooks), self.dtype, SHARD_BYTES)
        if wanted < self.rules.ctx_len:
            raise ConfigError(
                f"--rows-per-shard is {wanted}: expected at least one context of --ctx-len {self.rules.ctx_len}"
            )
        return wanted

    @property
    def layout(self) -> CacheLayout:
        """The arrays of the cache."""
        return cache_layout([hook.point() for hook in self.hooks], self.dtype, self.rows_per_shard)


def prepare(config: HarvestConfig, say: Say) -> Prepared:
    """Check a whole harvest without loading weights or writing anything."""
    check_out(config.out_path)
    quiet()
    located = locate(config.model)
    device = choose_device(config.model.device)
    compute_dtype = choose_compute_dtype(config.model.compute_dtype, device)
    located.placement.check(device)
    batch_tokens = config.tokens.batch_tokens or BATCH_TOKENS["cuda" if device.startswith("cuda") else "cpu"]
    if config.where.unit == "text":
        if located.placement.given:
            raise ConfigError("--unit text runs the model on one device: leave out --device-map and --load-in")
        if config.model.compile:
            check_compile(config.where, None, None, (), device)
        return _prepare_text(config, located, device, compute_dtype, batch_tokens, say)
    inner_transformer(located)
    base = skeleton(located)
    layers = n_layers(located, base)
    hooks = choose_hooks(base, layers, config.where, run_skeleton(base))
    if config.model.compile:
        check_compile(config.where, base, layers, hooks, device)
    probed = probe_skeleton(base, hooks)
    tokenizer = load_tokenizer(located)
    rules = _rules(config, located, base, tokenizer)
    if batch_tokens < rules.ctx_len and config.tokens.batch_tokens is not None:
        raise ConfigError(
            f"--batch-tokens is {batch_tokens}: expected at least one context of --ctx-len {rules.ctx_len}"
        )
    return Prepared(
        config=config,
        located=located,
        hooks=probed if probed is not None else guess_widths(hooks, located),
        widths_known=probed is not None,
        n_layers=layers,
        model_class=type(base).__name__,
        source=open_source(config.text, say),
        tokenizer=tokenizer,
        rules=rules,
        tokenize=_tokenize(config, located, tokenizer, say),
        render=chat_renderer(tokenizer),
        device=device,
        compute_dtype=compute_dtype,
        batch_tokens=max(batch_tokens, rules.ctx_len),
        flops_per_token=flops_per_token(base, hooks),
    )


def _tokenize(config: HarvestConfig, located: Located, tokenizer: Any, say: Say) -> Tokenize:
    load = functools.partial(load_tokenizer, located)
    return checked(text_tokenizer(tokenizer, load, config.tokens.num_proc, located.prompt), tokenizer, located, say)


def _rules(config: HarvestConfig, located: Located, base: nn.Module, tokenizer: Any) -> WindowRules:
    return window_rules(
        tokenizer,
        config.tokens,
        is_decoder=located.is_decoder,
        max_positions=max_positions(located, base),
        default_len=located.max_seq_length or DEFAULT_CTX_LEN,
    )


def _prepare_text(
    config: HarvestConfig, located: Located, device: str, compute_dtype: str, batch_tokens: int, say: Say
) -> Prepared:
    if config.tokens.pack or config.tokens.bos is not None or config.tokens.ctx_len is not None:
        raise ConfigError("--unit text embeds each text as the model does: leave out --pack, --bos and --ctx-len")
    hook = pooled_hook(located)
    known = bool(hook.d_in)
    has_tokenizer = located.config is not None
    tokenizer = load_tokenizer(located) if has_tokenizer else None
    return Prepared(
        config=config,
        located=located,
        hooks=(hook if known else replace(hook, d_in=1),),
        widths_known=known,
        n_layers=n_layers(located, None) if has_tokenizer else None,
        model_class=None if located.kind == SENTENCE_TRANSFORMER else "mean pooling",
        source=open_source(config.text, say),
        tokenizer=tokenizer,
        rules=TEXT_RULES,
        tokenize=pretend_tokens,
        render=chat_renderer(tokenizer) if tokenizer is not None else join_chat,
        device=device,
        compute_dtype=compute_dtype,
        batch_tokens=batch_tokens,
    )
