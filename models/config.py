"""Which model, which of its activations and how text is cut for it: checked as far as that needs no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sae_granary.common.errors import ConfigError, nearest

UNITS = ("token", "text")
COMPUTE_DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class ModelConfig:
    """Which model, in which number format it computes, and whether torch.compile compiles it."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    compute_dtype: str = "auto"
    device: str = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        one_of("--compute-dtype", self.compute_dtype, COMPUTE_DTYPES)
        if not self.model.strip():
            raise ConfigError("--model is empty: give a hub id, a local folder, or demo")


@dataclass(frozen=True)
class WhereConfig:
    """Which activations: blocks by number, modules by path or glob, or the pooled embedding of a text."""

    unit: str = "token"
    layers: tuple[int, ...] | Literal["all"] = ()
    layer_stride: int = 1
    hooks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        one_of("--unit", self.unit, UNITS)
        if self.layer_stride < 1:
            raise ConfigError(f"--layer-stride is {self.layer_stride}: give a number from 1")
        if self.unit == "text" and (self.layers or self.hooks):
            raise ConfigError("--unit text stores one pooled embedding per text: leave out --layer and --hook")
        if self.unit == "token" and not self.layers and not self.hooks and self.layer_stride == 1:
            raise ConfigError("nothing to harvest is named: give --layer 6, --layers all, or --hook MODULE")


@dataclass(frozen=True)
class TokenConfig:
    """How documents become windows and batches."""

    ctx_len: int | None = None
    bos: bool | None = None
    pack: bool = False
    batch_tokens: int | None = None
    num_proc: int = 1

    def __post_init__(self) -> None:
        if self.ctx_len is not None and self.ctx_len < 2:
            raise ConfigError(f"--ctx-len is {self.ctx_len}: a window needs at least 2 tokens")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise ConfigError(f"--batch-tokens is {self.batch_tokens}: give a positive number of tokens")
        if self.num_proc < 1:
            raise ConfigError(f"--num-proc is {self.num_proc}: give a number of processes from 1")


def one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not in a fixed list, with the nearest one that is."""
    if value not in allowed:
        raise ConfigError(f"{flag} is {value!r}: expected one of {', '.join(allowed)}{nearest(value, allowed)}")
