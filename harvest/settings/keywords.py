"""The flags of `sae-harvest run` as Python keywords, and the config that they make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from sae_granary.common.errors import ConfigError, nearest
from sae_granary.harvest.config import (
    DEFAULT_DATASET,
    HarvestConfig,
    TextConfig,
    count_of,
    parse_columns,
    parse_layers,
    parse_out,
)
from sae_granary.models.config import ModelConfig, TokenConfig, WhereConfig


class HarvestKeywords(TypedDict, total=False):
    """Each keyword means what the flag of its name means; a count is a number or text such as "5M"."""

    model: str  # hub id, local folder, or demo
    layers: int | str | Sequence[int]  # 6, [2, 4, 6], "2,4,6" or "all"
    hooks: str | Sequence[str]  # module paths or globs
    layer_stride: int
    unit: str
    revision: str | None
    trust_remote_code: bool
    compute_dtype: str
    device: str
    compile: bool
    dataset: str | None  # hub id, local file or folder, - for standard input, or demo
    dataset_config: str | None
    split: str | None
    dataset_revision: str | None
    text_columns: str | Sequence[str]
    keep_columns: str | Sequence[str]  # stored with the documents
    documents: str
    shuffle_buffer: int
    shuffle_seed: int
    ctx_len: int | None
    bos: bool | None
    pack: bool
    batch_tokens: int | None
    num_proc: int
    out: str | Path | None
    dtype: str
    max_tokens: int | str | None
    max_docs: int | str | None
    rows_per_shard: int | str | None


_MODEL = ("model", "revision", "trust_remote_code", "compute_dtype", "device", "compile")
_TEXT = ("dataset_config", "split", "dataset_revision", "documents", "shuffle_buffer", "shuffle_seed")
_TOKENS = ("ctx_len", "bos", "pack", "batch_tokens", "num_proc")
_COUNTS = ("max_tokens", "max_docs", "rows_per_shard")


def make_config(**keywords: Unpack[HarvestKeywords]) -> HarvestConfig:
    """The config of one harvest. Raises ConfigError for a keyword that is unknown, missing, or out of range."""
    given: dict[str, Any] = dict(keywords)
    for name in given:
        if name not in HarvestKeywords.__annotations__:
            hint = nearest(name, HarvestKeywords.__annotations__)
            raise ConfigError(f"a harvest has no setting {name!r}{hint}; `sae-harvest run --help` lists them")
    if "model" not in given:
        raise ConfigError("no model was given: name a hub id, a local folder, or demo")
    counts = {name: count_of("--" + name.replace("_", "-"), _text(given.get(name))) for name in _COUNTS}
    dataset = given.get("dataset")
    return HarvestConfig(
        model=ModelConfig(**{name: given[name] for name in _MODEL if name in given}),
        where=WhereConfig(
            given.get("unit", "token"),
            parse_layers(_texts(given.get("layers"))),
            given.get("layer_stride", 1),
            tuple(_texts(given.get("hooks"))),
        ),
        text=TextConfig(
            DEFAULT_DATASET if dataset is None else dataset,
            text_columns=parse_columns(_texts(given.get("text_columns")), "--text-column"),
            keep_columns=parse_columns(_texts(given.get("keep_columns")), "--keep-columns"),
            **{name: given[name] for name in _TEXT if name in given},
        ),
        tokens=TokenConfig(**{name: given[name] for name in _TOKENS if name in given}),
        out=parse_out(_text(given.get("out"))),
        dtype=given.get("dtype", "auto"),
        **counts,
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _texts(value: Any) -> list[str]:
    """One value or several, as the command line would give them."""
    if value is None:
        return []
    return [str(part) for part in ([value] if isinstance(value, str | int) else value)]
