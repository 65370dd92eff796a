"""Which model, which of its activations and how text is cut for it: checked as far as that needs no model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from sae_granary.common.errors import ConfigError
from sae_granary.common.settings.declare import check, setting
from sae_granary.models.device.placement import Placement, parse_device_map

_model = partial(setting, section="model", panel="Model")
_where = partial(setting, section="where", panel="Activations")
_contexts = partial(setting, section="contexts", panel="Contexts and batches")


def parse_layers(value: object) -> tuple[int, ...] | Literal["all"]:
    """`6`, `[2, 4]`, `"4,2"` or `["2,4", "6"]` -> block numbers, sorted, each once; `"all"` -> "all"."""
    values = [value] if isinstance(value, str) or not isinstance(value, Iterable) else value
    parts = [part.strip() for item in values for part in str(item).split(",") if part.strip()]
    if any(part.lower() == "all" for part in parts):
        if len(parts) > 1:
            raise ConfigError("layers=all includes every layer: leave out the other layers")
        return "all"
    if bad := [part for part in parts if not part.removeprefix("-").isdecimal() or len(part) > 9]:
        raise ConfigError(f"layers={bad[0]!r}: expected block numbers from 0, such as 6 or 2,4,6, or all")
    return tuple(sorted({int(part) for part in parts}))


@dataclass(frozen=True)
class ModelConfig:
    """Which model, in which number format it computes, and whether torch.compile compiles it."""

    model: str = _model(help="Hub id, local folder, or demo.", short="-m", common=True)
    revision: str | None = _model(None, help="Commit, tag or branch of a hub model.", common=True)
    trust_remote_code: bool = _model(False, help="Run the code that comes with the model. Read it first.", common=True)
    compute_dtype: str = _model(
        "auto",
        help="Precision of the forward pass; auto is bfloat16 on a GPU, float32 on a CPU.",
        choices=("auto", "float32", "float16", "bfloat16"),
    )
    device: str = _model("auto", help="auto (cuda if there is a GPU, else cpu), cpu, cuda, cuda:N or mps.", common=True)
    compile: bool = _model(
        False,
        help="Compile the blocks with torch.compile, which takes a minute. Worth it for long harvests in float32.",
    )

    device_map: str | None = _model(
        None,
        help="For a model larger than one GPU: auto, balanced, sequential, or JSON that gives modules a device; "
        "accelerate places them.",
        parse=parse_device_map,
    )
    load_in: str | None = _model(
        None, help="Load the weights with fewer bits (bitsandbytes, on a GPU).", choices=("8bit", "4bit")
    )

    def __post_init__(self) -> None:
        check(self)
        if not self.model.strip():
            raise ConfigError("--model is empty: give a hub id, a local folder, or demo")
        if self.device_map is not None:
            object.__setattr__(self, "device_map", parse_device_map(self.device_map))
        if self.compile and self.placement.given:
            raise ConfigError("--compile needs the model on one device with all its bits: leave it out")

    @property
    def placement(self) -> Placement:
        """How the model is loaded."""
        return Placement(self.device_map or "", self.load_in or "")


@dataclass(frozen=True)
class WhereConfig:
    """Which activations: blocks by number, modules by path or glob, or the pooled embedding of a text."""

    unit: str = _where(
        "token",
        help="What a row is: a token, or the pooled embedding of a text.",
        choices=("token", "text"),
        common=True,
    )
    layers: tuple[int, ...] | Literal["all"] = _where(
        (),
        help="Output of block i, counted from 0: 6, or 2,4,6, or all. Repeatable.",
        flag="--layer",
        also="--layers",
        short="-l",
        repeat=True,
        common=True,
        parse=parse_layers,
    )
    layer_stride: int = _where(1, help="Keep every n-th selected layer.", ge=1)
    hooks: tuple[str, ...] = _where(
        (),
        help="Module by path or glob; append :in for its input. See `sae-harvest names`. Repeatable.",
        flag="--hook",
        repeat=True,
        common=True,
        commas=False,
    )

    def __post_init__(self) -> None:
        check(self)
        if self.unit == "text" and (self.layers or self.hooks):
            raise ConfigError("--unit text stores one pooled embedding per text: leave out --layer and --hook")
        if self.unit == "token" and not self.layers and not self.hooks and self.layer_stride == 1:
            raise ConfigError("nothing to harvest is named: give --layer 6, --layers all, or --hook MODULE")


@dataclass(frozen=True)
class TokenConfig:
    """How documents become contexts and batches."""

    ctx_len: int | None = _contexts(
        None,
        help="Length of a context.",
        unit="tokens",
        ge=2,
        default_words="512, or less if the model takes less",
        common=True,
    )
    bos: bool | None = _contexts(
        None, help="Begin each context with the BOS token.", default_words="as the tokenizer does"
    )
    pack: bool = _contexts(False, help="Pack documents into each context, separated by EOS. For decoders.")
    batch_tokens: int | None = _contexts(
        None,
        help="Batch size of the model, padding included.",
        unit="tokens",
        ge=1,
        default_words="16384 on a GPU, 4096 on a CPU",
        common=True,
    )
    num_proc: int = _contexts(1, help="Number of processes that run a slow (Python) tokenizer.", ge=1)

    def __post_init__(self) -> None:
        check(self)
