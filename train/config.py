"""TrainConfig: every setting of a run, with its section, unit and range; and how layers of settings become one.

Precedence: defaults < the variant's recommended values < YAML < flags and `--set`. `None` means "decided from the cache
and the run's length" (`train.resolve`); the resolved config holds no undecided value and is what a run saves.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

import sae_core
from sae_core.options import check, option
from train.coerce import coerce
from train.errors import ConfigError, nearest

MAX_SEED = 2**63 - 1
SECTIONS = ("run", "model", "training", "data", "logging")
# Sections of a YAML file may also be called as other trainers call them.
_SECTION_ALIASES = {"wandb": "logging"}


def setting(default: Any, section: str, help: str, **bounds: Any) -> Any:
    """A field with its default, its section in the YAML file, a help line with the unit, and its range (ge, lt ...)."""
    metadata = {**option(help=help, **bounds).metadata, "section": section}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """What `sae-train run` does. `options` holds the variant's own settings, d_in and d_sae included once resolved."""

    cache: str = setting("", "run", "folder of the activation cache")
    type: str = setting("", "run", "variant, see `sae-train types`")
    hook: tuple[str, ...] = setting((), "run", "hook points of the cache; may stay open if there is one")
    name: str | None = setting(None, "run", "name of the run's folder (default: cache_hook_type_d_k_seed)")
    runs_dir: str = setting("runs", "run", "folder that runs are written to")
    seed: int = setting(0, "run", "seed of both shuffling and initialisation", ge=0, le=MAX_SEED)
    shuffle_seed: int | None = setting(None, "run", "seed of the order of rows (default: seed)", ge=0, le=MAX_SEED)
    init_seed: int | None = setting(None, "run", "seed of the weights (default: seed)", ge=0, le=MAX_SEED)
    device: str = setting("auto", "run", "cpu, cuda, cuda:1, ... (auto: cuda if there is one)")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "run", "matrix products (auto: float32)")

    expansion_factor: float | None = setting(None, "model", "d_sae / d_in when d_sae is not given (default: 8)", gt=0)

    batch_size: int = setting(4096, "training", "rows per optimizer step", gt=0)
    grad_acc_steps: int = setting(1, "training", "micro-batches that a batch is split into, to save memory", gt=0)
    tokens: int | None = setting(None, "training", "length of the run in rows", gt=0)
    steps: int | None = setting(None, "training", "length of the run in optimizer steps", gt=0)
    epochs: float | None = setting(
        None, "training", "length in passes (default: 1, more up to 16 if that is under 1000 steps)", gt=0
    )
    optimizer: Literal["adam", "adamw", "sgd"] = setting("adam", "training", "optimizer")
    lr: float | None = setting(
        None, "training", "peak rate (default: 2e-4 * sqrt(2^14 / d_sae), more under 1000 steps, <= 1e-3)", gt=0
    )
    weight_decay: float = setting(0.0, "training", "weight decay of the optimizer", ge=0)
    beta1: float = setting(0.9, "training", "Adam's first decay; momentum of sgd", ge=0, lt=1)
    beta2: float = setting(0.999, "training", "Adam's second decay", ge=0, lt=1)
    eps: float = setting(1e-8, "training", "Adam's epsilon", ge=0)
    grad_clip: float | None = setting(1.0, "training", "largest global gradient norm (none: no clipping)", gt=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = setting("linear", "training", "decay at the end")
    warmup_steps: int | None = setting(None, "training", "steps of linear warm-up (default: 5 %, at most 1000)", ge=0)
    decay_fraction: float = setting(0.2, "training", "share of the steps over which the rate decays", ge=0, le=1)
    lr_final: float = setting(0.0, "training", "the decay ends at this factor of the peak rate", ge=0, le=1)

    keep_special: bool = setting(False, "data", "train on special tokens")
    keep_first_position: bool | None = setting(
        None, "data", "train on position 0 of each window (default: unless the model is a decoder)"
    )
    min_position: int | None = setting(None, "data", "smallest position in the window", ge=0)
    max_position: int | None = setting(None, "data", "largest position in the window", ge=0)
    min_norm: float | None = setting(None, "data", "smallest row norm", ge=0)
    max_norm: float | None = setting(None, "data", "largest row norm", ge=0)
    holdout: float = setting(0.05, "data", "share of the documents that is held out for evaluation", ge=0, le=0.9)
    holdout_seed: int = setting(0, "data", "seed of the choice of held-out documents", ge=0)
    pool_rows: int | None = setting(None, "data", "rows shuffled together in memory (default: about 512 MiB)", gt=0)
    block_rows: int | None = setting(
        None, "data", "neighbouring rows read together (default: from pool and batch)", gt=0
    )

    log_every: int = setting(10, "logging", "steps between two lines of metrics", gt=0)
    save_every: int = setting(1000, "logging", "steps between checkpoints (0: only when stopped and at the end)", ge=0)
    keep: int = setting(2, "logging", "checkpoints to keep", gt=0)
    eval_rows: int = setting(2**17, "logging", "most held-out rows in the final evaluation", gt=0)
    wandb: Literal["off", "offline", "online"] = setting("off", "logging", "Weights & Biases")
    wandb_project: str = setting("granary", "logging", "project of Weights & Biases")

    options: Mapping[str, Any] = setting({}, "model", "the variant's own settings")

    def __post_init__(self) -> None:
        try:
            check(self)
        except sae_core.SAEError as error:
            raise ConfigError(str(error)) from None
        if self.batch_size % self.grad_acc_steps:
            raise ConfigError(
                f"batch_size={self.batch_size} does not split into grad_acc_steps={self.grad_acc_steps} equal parts"
            )
        lengths = {n: getattr(self, n) for n in ("tokens", "steps", "epochs") if getattr(self, n) is not None}
        if len(lengths) > 1:
            given = ", ".join(f"{name}={value}" for name, value in lengths.items())
            raise ConfigError(f"a run has one length, got {given}; give one of tokens, steps, epochs")


_HINTS = typing.get_type_hints(TrainConfig)
TRAINER_KEYS = tuple(f.name for f in fields(TrainConfig) if f.name != "options")


def variant_keys(type_name: str) -> dict[str, Any]:
    """Options of a variant with their annotations. d_in follows from the cache; a saved config repeats it."""
    cls = sae_core.registry.get(type_name)
    hints = typing.get_type_hints(cls.Config)
    return {f.name: hints[f.name] for f in fields(cls.Config)}


def make_config(layers: Sequence[Mapping[str, Any]]) -> TrainConfig:
    """Merge layers of flat settings, the last one wins; below them lie the variant's recommended values.

    Raises ConfigError for an unknown key (with the nearest known one) or a value that does not fit.
    """
    given: dict[str, Any] = {}
    for layer in layers:
        given.update(_one_length(given, layer))
    type_name = given.get("type")
    if not type_name:
        known = ", ".join(sae_core.registry.names())
        raise ConfigError(f"no type of SAE was given; choose one with --type: {known}")
    options = variant_keys(str(type_name))
    merged = {**sae_core.registry.get(str(type_name)).recommended(), **given}
    settings: dict[str, Any] = {}
    chosen: dict[str, Any] = {}
    for key, value in merged.items():
        if key in TRAINER_KEYS:
            settings[key] = coerce(key, value, _HINTS[key])
        elif key in options:
            chosen[key] = coerce(key, value, options[key])
        else:
            hint = nearest(key, [*options, *TRAINER_KEYS, *SECTIONS])
            listed = ", ".join(name for name in options if name != "d_in")
            raise ConfigError(f"unknown setting {key!r} for type {type_name}{hint} (its options: {listed})")
    if "d_sae" in chosen and settings.get("expansion_factor") is not None:
        factor = settings["expansion_factor"]
        raise ConfigError(f"d_sae={chosen['d_sae']} and expansion_factor={factor}: give one of them")
    return TrainConfig(**settings, options=chosen)


def _one_length(given: dict[str, Any], layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """A length or width in a higher layer replaces the other ways to say it in lower layers."""
    for group in (("tokens", "steps", "epochs"), ("d_sae", "expansion_factor")):
        if any(layer.get(key) is not None for key in group):
            for key in group:
                given.pop(key, None)
    return layer


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Flat settings of a YAML file, with or without sections (run, model, training, data, logging)."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not plain YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config file {path}: expected keys and values, got {type(content).__name__}")
    return dict(_flatten(content, str(path)))


def _flatten(content: Mapping[Any, Any], source: str) -> Iterator[tuple[str, Any]]:
    seen: set[str] = set()
    for key, value in content.items():
        name = _SECTION_ALIASES.get(str(key), str(key))
        is_section = name in SECTIONS and isinstance(value, Mapping | None)
        for inner, inner_value in (value or {}).items() if is_section else [(key, value)]:
            flat = str(inner).replace("-", "_")
            if flat in seen:
                raise ConfigError(f"{source}: {flat!r} is set twice")
            seen.add(flat)
            yield flat, inner_value


def parse_assignments(assignments: Sequence[str]) -> dict[str, str]:
    """`key=value` texts of `--set` as flat settings."""
    out: dict[str, str] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {text!r}: expected key=value")
        out[key.strip().replace("-", "_")] = value.strip()
    return out


def to_sections(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """The config as plain values by section, for YAML and JSON; `from_sections` reads it back."""
    out: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for spec in fields(TrainConfig):
        if spec.name in TRAINER_KEYS:
            out[spec.metadata["section"]][spec.name] = _plain(getattr(config, spec.name))
    out["model"].update({key: _plain(value) for key, value in config.options.items()})
    return out


def from_sections(content: Mapping[str, Any], source: str) -> TrainConfig:
    """Read a saved config back."""
    return make_config([dict(_flatten(content, source))])


def to_yaml(config: TrainConfig) -> str:
    """The config as YAML text."""
    text: str = yaml.safe_dump(to_sections(config), sort_keys=False, allow_unicode=True)
    return text


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
