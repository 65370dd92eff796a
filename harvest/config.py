"""What a harvest is asked to do: frozen dataclasses, checked as far as that needs no model and no data."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sae_granary.cache.format.storage import STORAGE
from sae_granary.common.errors import ConfigError
from sae_granary.common.files import user_path
from sae_granary.common.quantities import COUNT_WORDS, parse_count
from sae_granary.models.config import ModelConfig, TokenConfig, WhereConfig, one_of

DOCUMENT_MODES = ("auto", "file", "line", "paragraph")
DEFAULT_DATASET = "Salesforce/wikitext"
DEFAULT_DATASET_CONFIG = "wikitext-103-raw-v1"
DEFAULT_SPLIT = "train"

_MAX_LAYERS_IN_NAME = 6  # more layers than this make a folder name unreadable


@dataclass(frozen=True)
class TextConfig:
    """Where the text comes from and which part of a record is the text."""

    dataset: str = DEFAULT_DATASET
    dataset_config: str | None = None
    split: str | None = None  # of a hub dataset: DEFAULT_SPLIT
    dataset_revision: str | None = None
    text_columns: tuple[str, ...] = ()
    keep_columns: tuple[str, ...] = ()  # stored with the documents
    documents: str = "auto"
    shuffle_buffer: int = 0
    shuffle_seed: int = 0

    def __post_init__(self) -> None:
        one_of("--documents", self.documents, DOCUMENT_MODES)
        if not self.dataset.strip():
            raise ConfigError(
                "--dataset is empty: give a hub id, a local file or folder, - for standard input, or demo"
            )
        if len(set(self.keep_columns)) < len(self.keep_columns):
            raise ConfigError(f"--keep-columns {','.join(self.keep_columns)} names a column twice")
        if self.shuffle_buffer < 0:
            raise ConfigError(f"--shuffle-buffer is {self.shuffle_buffer}: give a number of documents, or 0 for none")


@dataclass(frozen=True)
class HarvestConfig:
    """One harvest."""

    model: ModelConfig
    where: WhereConfig
    text: TextConfig = field(default_factory=TextConfig)
    tokens: TokenConfig = field(default_factory=TokenConfig)
    out: Path | None = None
    dtype: str = "auto"
    max_tokens: int | None = None
    max_docs: int | None = None
    rows_per_shard: int | None = None

    def __post_init__(self) -> None:
        one_of("--dtype", self.dtype, ("auto", *STORAGE))
        for flag, value in (("--max-tokens", self.max_tokens), ("--max-docs", self.max_docs)):
            if value is not None and value < 1:
                raise ConfigError(f"{flag} is {value}: give a number from 1")
        if self.rows_per_shard is not None and self.rows_per_shard < 1:
            raise ConfigError(f"--rows-per-shard is {self.rows_per_shard}: give a number from 1")

    @property
    def out_path(self) -> Path:
        """Where the cache goes: `--out`, else a name made from the model and the layers."""
        return self.out if self.out is not None else Path("cache") / default_name(self.model.model, self.where)


def count_of(flag: str, text: str | None) -> int | None:
    """The value of a flag that counts: `5M` -> 5,000,000 (see `common.quantities`)."""
    if text is None:
        return None
    try:
        count = parse_count(text)
    except ValueError:
        count = 0
    if count < 1:
        hint = f" ({text.replace(',', '')}, without commas?)" if "," in text else ""
        raise ConfigError(f"{flag} is {text!r}: give {COUNT_WORDS}, at least 1{hint}")
    return count


def parse_out(text: str | None) -> Path | None:
    """`--out` as a path; an empty one would mean the current folder."""
    if text is not None and not text.strip():
        raise ConfigError("--out is empty: give a folder, or leave --out away for cache/<model>_l<layers>")
    return None if text is None else user_path("--out", text)


def parse_columns(values: list[str] | None, flag: str) -> tuple[str, ...]:
    """`["a,b", "c"]` -> ("a", "b", "c")."""
    parts = tuple(part.strip() for value in values or () for part in value.split(",") if part.strip())
    if values and not parts:
        raise ConfigError(f"{flag} is empty: give the name of a column, or leave {flag} away")
    return parts


def parse_layers(values: list[str]) -> tuple[int, ...] | Literal["all"]:
    """`["2,4", "6"]` -> (2, 4, 6); `["all"]` -> "all". Sorted, each once."""
    parts = [part.strip() for value in values for part in value.split(",") if part.strip()]
    if any(part.lower() == "all" for part in parts):
        if len(parts) > 1:
            raise ConfigError("--layers all includes every layer: leave out the other layers")
        return "all"
    bad = [part for part in parts if not re.fullmatch(r"-?\d+", part)]
    if bad:
        raise ConfigError(f"--layer is {bad[0]!r}: give block numbers from 0, such as 6 or 2,4,6, or all")
    return tuple(sorted({int(part) for part in parts}))


def default_name(model: str, where: WhereConfig) -> str:
    """`bert-base-uncased`, layer 6 -> `bert_l6`."""
    last = model.rstrip("/").split("/")[-1]
    word = next((part for part in re.split(r"[-_.\s]+", last) if part), "model").lower()
    word = re.sub(r"[^a-z0-9]+", "", word) or "model"
    if where.unit == "text":
        return f"{word}_text"
    parts = []
    if where.layers or not where.hooks:
        parts.append("l" + _layers_name(where))
    if len(where.hooks) == 1:
        parts.append(re.sub(r"[^A-Za-z0-9.]+", "-", where.hooks[0]).strip("-."))
    elif where.hooks:
        parts.append("hooks")
    return "_".join([word, *parts])


def _layers_name(where: WhereConfig) -> str:
    stride = f"x{where.layer_stride}" if where.layer_stride > 1 else ""
    if where.layers == "all" or not where.layers:
        return "all" + stride
    layers = [str(layer) for layer in where.layers]
    if len(layers) > _MAX_LAYERS_IN_NAME:
        return f"{layers[0]}to{layers[-1]}n{len(layers)}{stride}"
    return "-".join(layers) + stride
