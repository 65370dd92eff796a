"""What a harvest is asked to do: frozen dataclasses, checked as far as that needs no model and no data."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sae_granary.cache.format.storage import STORAGE
from sae_granary.common.errors import ConfigError
from sae_granary.common.settings.declare import check, setting
from sae_granary.models.config import ModelConfig, TokenConfig, WhereConfig

DEFAULT_DATASET = "Salesforce/wikitext"
DEFAULT_DATASET_CONFIG = "wikitext-103-raw-v1"
DEFAULT_SPLIT = "train"

_text = partial(setting, section="text", panel="Text")
_output = partial(setting, section="output", panel="Cache")
_MAX_LAYERS_IN_NAME = 6  # more layers than this make a folder name unreadable


@dataclass(frozen=True)
class TextConfig:
    """Where the text comes from and which part of a record is the text."""

    dataset: str = _text(
        DEFAULT_DATASET,
        help="Hub id, local file or folder, - for standard input, or demo.",
        short="-d",
        default_words="Salesforce/wikitext (wikitext-103)",
        common=True,
    )
    dataset_config: str | None = _text(None, help="Configuration of a hub dataset.", common=True)
    split: str | None = _text(
        None,
        help="Split of a hub dataset, or of a folder that holds several.",
        default_words="train, or all of a folder",
        common=True,
    )
    dataset_revision: str | None = _text(None, help="Commit, tag or branch of a hub dataset.")
    text_columns: tuple[str, ...] = _text(
        (),
        help="Column that holds the text; several (a,b) are joined. Repeatable.",
        flag="--text-column",
        repeat=True,
        default_words="detected",
        common=True,
    )
    keep_columns: tuple[str, ...] = _text(
        (), help="Columns to store with each document (a,b), for sae-analyze. Repeatable.", repeat=True, common=True
    )
    documents: str = _text(
        "auto",
        help="How .txt and .md files and standard input are split into documents.",
        choices=("auto", "file", "line", "paragraph"),
    )
    shuffle_buffer: int = _text(
        0, help="Size of the buffer that shuffles documents; 0 keeps their order.", unit="documents", ge=0
    )
    shuffle_seed: int = _text(0, help="Seed of the document shuffle.")

    def __post_init__(self) -> None:
        check(self)
        if not self.dataset.strip():
            raise ConfigError(
                "--dataset is empty: give a hub id, a local file or folder, - for standard input, or demo"
            )
        if len(set(self.keep_columns)) < len(self.keep_columns):
            raise ConfigError(f"--keep-columns {','.join(self.keep_columns)} names a column twice")


@dataclass(frozen=True)
class HarvestConfig:
    """One harvest."""

    model: ModelConfig
    where: WhereConfig
    text: TextConfig = field(default_factory=TextConfig)
    tokens: TokenConfig = field(default_factory=TokenConfig)
    out: Path | None = _output(
        None, help="Folder of the cache.", short="-o", default_words="cache/<model>_l<layers>", common=True
    )
    dtype: str = _output(
        "auto",
        help="Number format of the stored activations; auto is the one they were computed in.",
        choices=("auto", *STORAGE),
        common=True,
    )
    max_tokens: int | None = _output(
        None,
        help="Maximum length of the cache, such as 20k, 5M or 1.5B; the last document is completed.",
        unit="rows",
        ge=1,
        common=True,
    )
    max_docs: int | None = _output(None, help="Maximum length of the cache.", unit="documents", ge=1, common=True)
    rows_per_shard: int | None = _output(None, help="Shard size.", unit="rows", ge=1, default_words="about 512 MiB")
    block_docs: int | None = _output(
        None,
        help="Let several processes share --out: each harvests blocks of so many documents.",
        unit="documents",
        ge=1,
        le=1_000_000_000,
        default_words="4,096 under torchrun, else no blocks",
    )
    extend: bool = _output(
        False, help="Continue a complete cache with more of its text, up to --max-tokens.", common=True
    )

    def __post_init__(self) -> None:
        check(self)

    @property
    def out_path(self) -> Path:
        """Where the cache goes: `--out`, else a name made from the model and the layers."""
        return self.out if self.out is not None else Path("cache") / default_name(self.model.model, self.where)


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
