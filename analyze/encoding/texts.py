"""Texts -> codes, through the model that a cache was harvested from, with the windows of that harvest.

Shapes: N rows of all texts together, D = d_in, F = d_sae.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_granary.analyze.errors import AnalyzeError, MismatchError
from sae_granary.analyze.source import Source, open_source
from sae_granary.cache.format.manifest import Manifest
from sae_granary.common.rows import HookPoint
from sae_granary.models.forward import TokenModel, hooked_model
from sae_granary.models.hooks import Hook, probe
from sae_granary.models.language.recorded import check_recorded_weights, locate_recorded
from sae_granary.models.load import load_base
from sae_granary.models.locate import Located
from sae_granary.models.tokens.contexts import Tokenize, Window, WindowRules
from sae_granary.models.tokens.document import Document
from sae_granary.models.tokens.stream import WindowStream, buffers, tokenize_stream
from sae_granary.models.tokens.tokenizer import load_tokenizer, text_tokenizer
from sae_granary.sae_core import Codes

BATCH_TOKENS, BUFFER_TOKENS = 4096, 65536


@dataclass(frozen=True, eq=False)
class EncodedTexts:
    """The codes of texts, token by token: the rows that a harvest of these texts would hold, in its order."""

    codes: Codes  # (N, F)
    tokens: tuple[str, ...]  # (N,) as the tokenizer writes them, special tokens included
    text: NDArray[np.int64]  # (N,) which text each row is of
    flags: NDArray[np.uint8]  # (N,) FLAG_* bits of `common.rows`


def encode_texts(
    sae: str | Path,
    texts: Sequence[str],
    *,
    cache: str | Path | None = None,
    hooks: Sequence[str] = (),
    model: str | None = None,
    device: str = "auto",
) -> EncodedTexts:
    """Encode texts with an SAE, through the model of a cache that holds its hook points: by default its own.

    The texts are cut as in that harvest (context length, special tokens), each on its own also where the harvest packed
    documents. `model` says where the model is, if not where the cache says.

    >>> from sae_granary import encode_texts
    >>> found = encode_texts("runs/demo_topk", ["a loop ends with break"], device="cpu")
    >>> found.tokens, found.codes.shape
    (('[CLS]', 'a', 'loop', 'ends', 'with', 'break', '[SEP]'), (7, 768))

    Raises MismatchError where SAE, cache and model do not fit, AnalyzeError for no tokens, ModelError where the model
    is missing or has other weights than were harvested.
    """
    source = open_source(sae, cache, hooks=hooks, device=device, allow_incomplete=True)
    return encode_with(source, texts, model=model)


@torch.no_grad()
def encode_with(source: Source, texts: Sequence[str], *, model: str | None = None) -> EncodedTexts:
    """`encode_texts` for an open source."""
    manifest = source.cache.manifest
    if manifest.unit != "token":
        raise AnalyzeError(
            f"{source.cache.path} holds one row per text: only texts of caches with one row per token can be encoded"
        )
    rules, located = rules_of(manifest), locate_recorded(manifest.model, model, "--model")
    check_recorded_weights(located, manifest.model, "--model")
    tokenizer = load_tokenizer(located)
    tokenize = text_tokenizer(tokenizer, lambda: load_tokenizer(located), 1, located.prompt)
    points = [source.cache.hook_points[name] for name in source.hooks]
    device = str(source.sae.core.W_dec.device)
    run = _token_model(located, manifest, tokenizer, rules, points, device)
    windows: list[Window] = []
    parts: list[Mapping[str, Tensor]] = []
    for buffer in buffers(_windows(texts, tokenize, rules), BUFFER_TOKENS):
        windows += buffer.windows
        parts.append(run(run.prepare(buffer), lambda n_rows: None))
    if not windows:
        raise AnalyzeError(f"the {len(texts):,} texts hold no tokens: give at least one text with words in it")
    codes = source.sae.encode({name: torch.cat([part[name] for part in parts]).float() for name in source.hooks})
    ids = np.concatenate([window.ids for window in windows])
    return EncodedTexts(
        codes,
        tuple(str(token) for token in tokenizer.convert_ids_to_tokens(ids.tolist())),
        np.concatenate([window.doc_id for window in windows]),
        np.concatenate([window.flags for window in windows]),
    )


def rules_of(manifest: Manifest) -> WindowRules:
    """How the harvest of a cache cut texts; packing apart. Raises AnalyzeError where the cache does not say."""
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


def _windows(texts: Sequence[str], tokenize: Tokenize, rules: WindowRules) -> WindowStream:
    documents = [Document(i, text, "text", i) for i, text in enumerate(texts)]
    return WindowStream(tokenize_stream(documents, tokenize), rules)


def _token_model(
    located: Located, manifest: Manifest, tokenizer: Any, rules: WindowRules, points: Sequence[HookPoint], device: str
) -> TokenModel:
    """The model of a cache at its hook points."""
    compute = manifest.provenance.get("compute") or {}
    base = load_base(located, str(compute.get("dtype") or "float32"), device)
    hooks = probe(base, [Hook(point.name, point.module, point.side) for point in points], device)
    if differing := [p.name for p, hook in zip(points, hooks, strict=True) if hook.point() != p]:
        raise MismatchError(f"{located.name} has another {differing[0]} than the cache: it is another model")
    sizes = {"batch_tokens": max(BATCH_TOKENS, rules.ctx_len)}
    return hooked_model(base, hooks, tokenizer, rules, device=device, name=located.name, say=lambda text: None, **sizes)
