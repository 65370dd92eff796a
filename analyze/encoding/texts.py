"""Texts -> codes, through the model that a cache was harvested from, with the windows of that harvest.

Shapes: N rows of all texts together, F = d_sae.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sae_granary.analyze.encoding.encode import BLOCK_ROWS
from sae_granary.analyze.encoding.text_rows import TextBlock, open_text_rows
from sae_granary.analyze.errors import AnalyzeError
from sae_granary.analyze.source import open_source
from sae_granary.common.errors import ConfigError
from sae_granary.models.tokens.document import Document, text_document
from sae_granary.sae_core import SAE, Codes
from sae_granary.sae_core.codes import Pattern


@dataclass(frozen=True, eq=False)
class EncodedTexts:
    """The codes of texts: the rows that a harvest of these texts would hold, in its order.

    A row is a token, special tokens included, or a whole text where the cache holds one row per text.
    """

    codes: Codes  # (N, F)
    tokens: tuple[str, ...]  # (N,) as the tokenizer writes them; the texts where a row is a whole text
    text: NDArray[np.int64]  # (N,) which text each row is of
    flags: NDArray[np.uint8]  # (N,) FLAG_* bits of `common.rows`


@torch.no_grad()
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
    documents. A text without tokens has no rows. `model` says where the model is, if not where the cache says. Memory:
    the codes of all texts, and the rows of 65,536 tokens.

    >>> from sae_granary import encode_texts
    >>> found = encode_texts("runs/demo_topk", ["a loop ends with break"], device="cpu")
    >>> found.tokens, found.codes.shape
    (('[CLS]', 'a', 'loop', 'ends', 'with', 'break', '[SEP]'), (7, 768))

    Raises MismatchError where SAE, cache and model do not fit, AnalyzeError where no text has tokens, ModelError where
    the model is missing or has other weights than were harvested, ConfigError for texts that are none.
    """
    source = open_source(sae, cache, hooks=hooks, device=device, allow_incomplete=True)
    documents = documents_of(texts)
    rows = open_text_rows(source.cache, source.hooks, model, str(source.sae.core.W_dec.device))
    blocks = list(encoded_blocks(source.sae, rows.blocks(documents)))
    if not texts:
        raise AnalyzeError("no texts are given, expected at least one with words in it")
    if not blocks:
        first = " ".join(documents[0].text.split())[:40] if documents else ""
        raise AnalyzeError(
            f"none of the texts holds a token (the first is {first!r}): give at least one text with words in it"
        )
    doc_ids = np.concatenate([block.doc_ids for _, block in blocks])
    if rows.tokenizer is None:
        tokens = [documents[i].text for i in doc_ids]
    else:
        tokens = rows.tokens(np.concatenate([block.token_ids for _, block in blocks]))
    flags = np.concatenate([block.flags for _, block in blocks])
    return EncodedTexts(_join([codes for codes, _ in blocks]), tuple(tokens), doc_ids, flags)


def encoded_blocks(sae: SAE, blocks: Iterable[TextBlock]) -> Iterator[tuple[Codes, TextBlock]]:
    """Rows of texts with their codes, at most BLOCK_ROWS at once."""
    for block in blocks:
        for start in range(0, len(block.doc_ids), BLOCK_ROWS):
            part = block.part(start, start + BLOCK_ROWS)
            yield sae.encode(part.activations), part


def documents_of(texts: Sequence[str]) -> list[Document]:
    """Texts as documents, numbered from 0. Raises ConfigError for a single string, and for anything but strings."""
    if isinstance(texts, str):
        raise ConfigError("texts is one string, expected a list of them: [text]")
    if wrong := [(i, text) for i, text in enumerate(texts) if not isinstance(text, str)]:
        raise ConfigError(f"text {wrong[0][0]} is {type(wrong[0][1]).__name__}, expected a string")
    return [text_document(i, text, "text", i) for i, text in enumerate(texts)]


def _join(parts: Sequence[Codes]) -> Codes:
    """Concatenate the rows of several codes of one SAE."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(part.indices.numel() for part in parts)])
    indptr = [part.indptr[1:] + int(start) for part, start in zip(parts, starts, strict=False)]
    pattern = Pattern(
        sum(part.shape[0] for part in parts),
        parts[0].shape[1],
        torch.cat([part.indices for part in parts]),
        torch.cat([parts[0].indptr[:1], *indptr]),
    )
    return Codes(torch.cat([part.values.reshape(-1) for part in parts]), pattern)
