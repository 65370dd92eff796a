"""What the configuration files of a Sentence-Transformer say about its input and output."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sae_granary.models.errors import ModelError

# In the folder of the first module, in the order in which sentence-transformers looks for them.
SENTENCE_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# What the config, the weights and the tokenizer are loaded with, by its older and its newer name.
_KWARGS = {
    "config": ("config_args", "config_kwargs"),
    "model": ("model_args", "model_kwargs"),
    "tokenizer": ("tokenizer_args", "processor_kwargs"),
}
_OURS = {
    "trust_remote_code", "token", "cache_dir", "revision", "local_files_only", "subfolder", "dtype", "torch_dtype",
    "device_map",
}  # fmt: skip


def sentence_settings(name: str, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Located` that only a Sentence-Transformer has; `name` is the model's, for messages.

    `settings` is the first of SENTENCE_CONFIGS, `defaults` is config_sentence_transformers.json. Raises ModelError.
    """
    prompts, chosen = defaults.get("prompts"), defaults.get("default_prompt_name")
    prompts = {"query": "", "document": "", **(prompts if isinstance(prompts, dict) else {})}
    if chosen is not None and chosen not in prompts:
        raise ModelError(f"{name}: its default prompt {chosen!r} is not among its prompts {', '.join(prompts)}")
    kwargs = {kind: _kwargs(settings, names) for kind, names in _KWARGS.items()}
    return {
        "max_seq_length": _length(kwargs["tokenizer"].get("model_max_length", settings.get("max_seq_length"))),
        "kwargs": kwargs,
        "do_lower_case": bool(settings.get("do_lower_case")),
        "prompt": str(prompts.get(chosen) or ""),
        "truncate_dim": _length(defaults.get("truncate_dim")),
    }


def _kwargs(settings: Mapping[str, Any], names: tuple[str, str]) -> dict[str, Any]:
    found: Mapping[str, Any] = next((settings[name] for name in names if isinstance(settings.get(name), dict)), {})
    return {key: value for key, value in found.items() if key not in _OURS}


def _length(value: object) -> int | None:
    """A positive number as int; None for no limit, which some files write as null or Infinity."""
    return int(value) if isinstance(value, int | float) and 1 <= value < math.inf else None
