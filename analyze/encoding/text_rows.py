"""Texts -> the rows that a harvest of them would store, through the model of a cache.

Shapes: N rows of a block, D = d_in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sae_granary.analyze.errors import AnalyzeError, MismatchError
from sae_granary.cache.format.manifest import Manifest
from sae_granary.cache.load.decode import rounding
from sae_granary.cache.read.reader import Cache
from sae_granary.common.rows import HookPoint
from sae_granary.models.forward import TokenModel, hooked_model
from sae_granary.models.hooks import Hook, probe
from sae_granary.models.language.recorded import check_recorded_weights, locate_recorded
from sae_granary.models.load import load_base
from sae_granary.models.locate import Located
from sae_granary.models.pooled import (
    BUFFER_TEXTS,
    TEXT_RULES,
    TextModel,
    load_pooled,
    observe_pooled,
    pooled_width,
    pretend_tokens,
)
from sae_granary.models.tokens.contexts import Tokenize, WindowRules
from sae_granary.models.tokens.document import Document
from sae_granary.models.tokens.stream import WindowStream, buffers, tokenize_stream
from sae_granary.models.tokens.tokenizer import load_tokenizer, text_tokenizer

BATCH_TOKENS, BUFFER_TOKENS = 4096, 65536
BUFFER_BYTES = 2**28  # of the rows of a buffer, as float32


@dataclass(frozen=True, eq=False)
class TextBlock:
    """Rows of some texts, in order; a row is a token, or a whole text if the cache has one row per text."""

    activations: Mapping[str, Tensor]  # hook point -> (N, D) float32, rounded as the cache stores them
    token_ids: NDArray[np.int32]  # (N,) -1 where a row is a whole text
    doc_ids: NDArray[np.int64]  # (N,) `doc_id` of the document of each row
    flags: NDArray[np.uint8]  # (N,) FLAG_* bits of `common.rows`
    is_first: NDArray[np.bool_]  # (N,) position 0 of a window

    def part(self, start: int, stop: int) -> TextBlock:
        """Rows start..stop."""
        rows = {name: values[start:stop] for name, values in self.activations.items()}
        part = slice(start, stop)
        return TextBlock(rows, self.token_ids[part], self.doc_ids[part], self.flags[part], self.is_first[part])


@dataclass(frozen=True, eq=False)
class TextRows:
    """The model of a cache, and how its harvest processed texts; see `open_text_rows`."""

    model: TokenModel | TextModel
    tokenizer: Any  # None where a row is a whole text
    tokenize: Tokenize
    rules: WindowRules
    hooks: tuple[str, ...]
    as_stored: Mapping[str, Callable[[Tensor], Tensor]]  # rounds the rows of a hook point as the cache does
    buffer_rows: int  # sorted together by length

    def blocks(self, documents: Iterable[Document]) -> Iterator[TextBlock]:
        """The rows of documents, about `buffer_rows` at once. Skipped documents and those without tokens have none."""
        stream = WindowStream(tokenize_stream(documents, self.tokenize), self.rules)
        for buffer in buffers(stream, self.buffer_rows):
            found = self.model(self.model.prepare(buffer), lambda n_rows: None)
            windows = buffer.windows
            rows = {name: self.as_stored[name](found[name]) for name in self.hooks}
            yield TextBlock(
                rows,
                token_ids=np.concatenate([w.ids for w in windows]),
                doc_ids=np.concatenate([w.doc_id for w in windows]),
                flags=np.concatenate([w.flags for w in windows]),
                is_first=np.concatenate([np.arange(len(w)) == 0 for w in windows]),
            )

    def tokens(self, token_ids: NDArray[np.int32]) -> list[str]:
        """Tokens as the tokenizer writes them."""
        return [str(token) for token in self.tokenizer.convert_ids_to_tokens(token_ids.tolist())]


def open_text_rows(cache: Cache, hooks: Sequence[str], model: str | None, device: str) -> TextRows:
    """Load the model of a cache at hook points of it, also added ones; `model` is where it is, if it was moved.

    Texts are cut as in that harvest (context length, special tokens), each on its own also where the harvest packed
    documents. Raises ModelError where the model is missing or has other weights, MismatchError where its hook points
    differ, AnalyzeError where the cache does not record how texts were cut.
    """
    manifest = cache.manifest
    whole = manifest.unit == "text"
    rules = TEXT_RULES if whole else rules_of(manifest)
    located = locate_recorded(manifest.model, model, "--model")
    check_recorded_weights(located, manifest.model, "--model")
    points = [cache.hook_points[name] for name in hooks]
    dtype = str((manifest.provenance.get("compute") or {}).get("dtype") or "float32")
    stored = {name: rounding(cache.holder(name).layout, name) for name in hooks}
    if whole:
        pooled = _pooled_model(located, points[0], dtype, device)
        return TextRows(pooled, None, pretend_tokens, rules, tuple(hooks), stored, BUFFER_TEXTS)
    tokenizer = load_tokenizer(located)
    tokenize = text_tokenizer(tokenizer, lambda: load_tokenizer(located), 1, located.prompt)
    tokens = _token_model(located, dtype, tokenizer, rules, points, device)
    by_memory = max(1, BUFFER_BYTES // (4 * sum(point.d_in for point in points)))
    return TextRows(tokens, tokenizer, tokenize, rules, tuple(hooks), stored, min(BUFFER_TOKENS, by_memory))


def rules_of(manifest: Manifest) -> WindowRules:
    """How the harvest of a cache cut texts, without packing. Raises AnalyzeError if the cache does not say."""
    windows, tokenizer = manifest.provenance.get("windows"), manifest.provenance.get("tokenizer")
    if not isinstance(windows, Mapping) or not isinstance(tokenizer, Mapping) or not windows.get("ctx_len"):
        raise AnalyzeError("the cache has no record of its windows and its tokenizer: harvest again with sae-harvest")
    return WindowRules(
        int(windows["ctx_len"]),
        tuple(windows.get("prefix") or ()),
        tuple(windows.get("suffix") or ()),
        None,
        frozenset(tokenizer.get("special_ids") or ()),
        frozenset(tokenizer.get("control_ids") or ()),
    )


def _token_model(
    located: Located, dtype: str, tokenizer: Any, rules: WindowRules, points: Sequence[HookPoint], device: str
) -> TokenModel:
    """The model of a cache at its hook points."""
    base = load_base(located, dtype, device)
    hooks = probe(base, [Hook(point.name, point.module, point.side) for point in points], device)
    if differing := [p.name for p, hook in zip(points, hooks, strict=True) if hook.point() != p]:
        raise MismatchError(f"{located.name} has another {differing[0]} than the cache: it is another model")
    sizes = {"batch_tokens": max(BATCH_TOKENS, rules.ctx_len)}
    return hooked_model(base, hooks, tokenizer, rules, device=device, name=located.name, say=lambda text: None, **sizes)


def _pooled_model(located: Located, point: HookPoint, dtype: str, device: str) -> TextModel:
    """The Sentence-Transformer of a cache of whole texts."""
    model = load_pooled(located, dtype, device)
    if (width := pooled_width(model)) != point.d_in:
        raise MismatchError(f"{located.name} embeds a text in {width} numbers, the cache holds {point.d_in}")
    behavior = observe_pooled(model, BATCH_TOKENS)
    return TextModel(model, width, device, batch_tokens=BATCH_TOKENS, say=lambda text: None, behavior=behavior)
