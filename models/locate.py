"""Finding a model by hub id, local folder or `demo`, and reading its config; weights are not read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sae_granary.common.errors import one_line
from sae_granary.common.files import hash_files, home_path
from sae_granary.models.config import ModelConfig
from sae_granary.models.demo import DEMO, DEMO_MODEL_ID, check_demo_weights, demo_model_path
from sae_granary.models.device.placement import NOT_PLACED, Placement
from sae_granary.models.errors import LOAD_ERRORS, ModelError
from sae_granary.models.online import OFFLINE_HINT, online
from sae_granary.models.sentence import SENTENCE_CONFIGS, sentence_settings

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
SENTENCE_TRANSFORMER = "sentence-transformer"
TRANSFORMER = "transformer"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Located:
    """Location of a model's files, and the kind of model."""

    name: str  # as the user gave it
    model_id: str  # what provenance calls it
    source: str  # local folder or hub id, for from_pretrained
    kind: str = TRANSFORMER
    modules: tuple[dict[str, Any], ...] = ()  # of a Sentence-Transformer: modules.json
    max_seq_length: int | None = None  # of a Sentence-Transformer, as the following four
    do_lower_case: bool = False  # before the tokenizer's own rules
    prompt: str = ""  # in front of every text: its default prompt
    truncate_dim: int | None = None  # of the pooled embedding
    kwargs: dict[str, dict[str, Any]] = field(default_factory=dict)  # what its config, model, tokenizer are loaded with
    revision: str | None = None  # resolved commit of a hub model
    trust_remote_code: bool = False
    local_only: bool = False
    subfolder: str = ""  # of the transformer inside a Sentence-Transformer
    config: Any = field(default=None, repr=False)  # transformers config
    placement: Placement = NOT_PLACED
    causal: bool | None = None  # what the loaded model does (`models.behavior.checks`); None: not known yet

    @property
    def is_local(self) -> bool:
        """Whether `source` is a folder."""
        return Path(self.source).is_dir()

    @property
    def hub_kwargs(self) -> dict[str, Any]:
        """Arguments for every `from_pretrained` of this model."""
        kwargs: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.subfolder:
            kwargs["subfolder"] = self.subfolder
        if not self.is_local:
            kwargs |= {"revision": self.revision, "local_files_only": self.local_only}
        return kwargs

    def kwargs_of(self, kind: str) -> dict[str, Any]:
        """Arguments for loading its "config", "model" or "tokenizer"."""
        return self.kwargs.get(kind, {}) | self.hub_kwargs

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether only the encoder half is harvested."""
        return bool(getattr(self.config, "is_encoder_decoder", False))

    @property
    def text_config(self) -> Any:
        """The config of the language part (of a multimodal model), else the config."""
        get = getattr(self.config, "get_text_config", None)
        return get() if get is not None else self.config

    @cached_property
    def is_decoder(self) -> bool:
        """Whether each token attends only to earlier ones, as observed on the loaded model or else by its config."""
        from transformers.models.auto import modeling_auto as auto

        if self.causal is not None:
            return self.causal and not self.is_encoder_decoder
        if self.is_encoder_decoder or getattr(self.text_config, "use_bidirectional_attention", None) in (True, "all"):
            return False
        if getattr(self.config, "is_decoder", False):
            return True
        model_type = getattr(self.text_config, "model_type", "")
        causal = model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        masked = model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        named = any(str(name).endswith("ForCausalLM") for name in getattr(self.config, "architectures", None) or ())
        return (causal and not masked) or (named and not masked)


def locate(config: ModelConfig) -> Located:
    """Find the model and read its config. Raises ModelError with a one-line reason."""
    return read_configs(replace(_find(config), placement=config.placement))


def read_configs(located: Located) -> Located:
    """Add what the model's own files say: kind, modules, config and, for a hub model, its commit.

    Raises ModelError; its cause is the error of transformers.
    """
    located = _sentence_transformer(located)
    located = replace(located, config=_load_config(located))
    return replace(located, revision=_commit(located) or located.revision)


def check_weights(located: Located) -> None:
    """Refuse a local folder without weights, and a damaged demo model, before any work starts."""
    if located.name == DEMO:
        check_demo_weights(Path(located.source))
    if located.is_local and not weight_files(located):
        raise ModelError(f"{located.source} has a config but no weights ({' or '.join(WEIGHT_PATTERNS)})")


def weight_files(located: Located) -> list[Path]:
    """The weight files of a local model, sorted; safetensors before pickles, as transformers prefers them."""
    folder = Path(located.source) / located.subfolder
    for pattern in WEIGHT_PATTERNS:
        if files := sorted(path for path in folder.glob(pattern) if path.is_file()):
            return files
    return []


def weights_hash(located: Located) -> str:
    """Hash of all weights of a local model, including every module of a Sentence-Transformer."""
    files = weight_files(located)
    for module in located.modules[1:]:
        for pattern in WEIGHT_PATTERNS:
            files += sorted((Path(located.source) / str(module["path"])).rglob(pattern)) if module["path"] else []
    return hash_files(files)


def is_path(name: str) -> bool:
    """Whether a model's name can only be a folder."""
    return home_path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def _find(config: ModelConfig) -> Located:
    if config.model == DEMO:
        if config.revision is not None:
            raise ModelError("--model demo has one version: leave out --revision")
        return Located(DEMO, DEMO_MODEL_ID, str(demo_model_path()), trust_remote_code=config.trust_remote_code)
    path = home_path(config.model)
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "modules.json").is_file():
            raise ModelError(f"the folder {config.model} holds no model: neither config.json nor modules.json is there")
        return Located(config.model, config.model, str(path), trust_remote_code=config.trust_remote_code)
    if is_path(config.model):
        raise ModelError(f"there is no folder {config.model}: give a hub id, a local folder, or demo")
    local_only = not online()
    return Located(
        config.model, config.model, config.model, revision=config.revision,
        trust_remote_code=config.trust_remote_code, local_only=local_only,
    )  # fmt: skip


def _sentence_transformer(located: Located) -> Located:
    modules_file = file_of(located, "modules.json")
    if modules_file is None:
        return located
    modules = read_json(modules_file, located)
    if not isinstance(modules, list) or not all(isinstance(item, dict) and "type" in item for item in modules):
        raise ModelError(f"{located.name}: modules.json is not a list of modules")
    modules = tuple({"type": str(item["type"]), "path": str(item.get("path", ""))} for item in modules)
    subfolder = modules[0]["path"] if modules else ""
    located = replace(located, kind=SENTENCE_TRANSFORMER, modules=modules, subfolder=subfolder)
    names = (f"{subfolder}/{name}".lstrip("/") for name in SENTENCE_CONFIGS)
    settings = next((found for name in names if (found := _settings(located, name))), {})
    defaults = _settings(located, "config_sentence_transformers.json")
    return replace(located, **sentence_settings(located.name, settings, defaults))


def _settings(located: Located, name: str) -> dict[str, Any]:
    path = file_of(located, name)
    found = read_json(path, located) if path is not None else None
    return found if isinstance(found, dict) else {}


def inner_transformer(located: Located) -> None:
    """Refuse a Sentence-Transformer whose first module is not a transformer: its layers cannot be hooked."""
    if located.modules and not located.modules[0]["type"].endswith("Transformer"):
        kind = located.modules[0]["type"].rsplit(".", 1)[-1]
        raise ModelError(f"{located.name} starts with a {kind} module, not a transformer: only --unit text works")


def _load_config(located: Located) -> Any:
    from transformers import AutoConfig

    if located.modules and not located.modules[0]["type"].endswith("Transformer"):
        return None
    try:
        return AutoConfig.from_pretrained(located.source, **located.kwargs_of("config"))
    except LOAD_ERRORS as error:
        raise ModelError(_why_no_config(located, error)) from error


def _why_no_config(located: Located, error: BaseException) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return f"{located.name} runs its own code: read it, then allow it with --trust-remote-code"
    if located.is_local:
        return f"the config of {located.name} cannot be read: {one_line(error)}"
    if located.local_only:
        return f"unknown model {located.name!r}: {OFFLINE_HINT.format(kind='--model')}"
    where = f" at revision {located.revision!r}" if located.revision else ""
    return f"unknown model {located.name!r}{where} ({one_line(error)}): give a hub id, a local folder, or demo"


def file_of(located: Located, name: str) -> Path | None:
    """A file of the model, or None if it has none of this name. Raises ModelError."""
    if located.is_local:
        path = Path(located.source) / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    try:
        found = cached_file(
            located.source, name, revision=located.revision, local_files_only=located.local_only,
            _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise ModelError(_why_no_config(located, error)) from error
    return Path(found) if found else None


def _commit(located: Located) -> str | None:
    """Commit of a hub model's files: the name of its snapshot folder in the local hub cache."""
    found = None if located.is_local else file_of(located, f"{located.subfolder}/config.json".lstrip("/"))
    return None if found is None else commit_of(found)


def commit_of(file: Path) -> str | None:
    """Commit of a file in the local hub cache."""
    return next((part for part in file.parts if _COMMIT.fullmatch(part)), None)


def read_json(path: Path, located: Located) -> Any:
    """A JSON file of the model. Raises ModelError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{located.name}: {path.name} is not JSON ({one_line(error)})") from error
