"""Loading models: a skeleton without weights for checks, and the real one."""

from __future__ import annotations

import copy
import inspect
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from sae_granary.common.errors import GranaryError, one_line
from sae_granary.models.errors import LOAD_ERRORS, ModelError
from sae_granary.models.hooks import Hook, Seen, probe, probe_all
from sae_granary.models.locate import Located

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")

# transformers replaces torch's initializations while it builds a model: two threads at once would leave them replaced.
LOADING = threading.RLock()

# Modules that a harvest never reaches: a checkpoint may lack their weights.
_UNUSED = re.compile(r"^(pooler|lm_head|classifier|qa_outputs|score|cls)(\.|$)")


def choose_compute_dtype(wanted: str, device: str) -> str:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if device.startswith("cuda") else "float32"


def skeleton(located: Located) -> nn.Module:
    """The base model on the meta device: its modules and shapes, no weights."""
    import torch
    from transformers import AutoModel

    kind, config = _model_class(located), copy.deepcopy(located.config)  # some models write into their config
    try:
        with LOADING, torch.device("meta"):
            if kind is AutoModel:
                model = AutoModel.from_config(config, trust_remote_code=located.trust_remote_code)
            else:
                model = kind(config)
    except LOAD_ERRORS as error:
        raise ModelError(f"{located.name} cannot be built from its config: {one_line(error)}") from error
    return takes_text(base_model(model), located).eval()


def _model_class(located: Located) -> Any:
    """AutoModel, or the partial model that the checkpoint was saved from: T5EncoderModel, DPRContextEncoder."""
    import torch
    import transformers

    names = getattr(located.config, "architectures", None) or ()
    named: Any = getattr(transformers, str(names[0]), None) if names else None
    if not isinstance(named, type) or not issubclass(named, transformers.PreTrainedModel):
        return transformers.AutoModel
    auto = transformers.MODEL_MAPPING.get(type(located.config), ())
    known = auto if isinstance(auto, tuple) else (auto,)
    if named in known or getattr(named, "config_class", None) is not type(located.config):
        return transformers.AutoModel
    with torch.device("meta"):
        model: Any = named(copy.deepcopy(located.config))
    return named if model.base_model is model else transformers.AutoModel  # else it is that model with a head


def base_model(model: nn.Module) -> nn.Module:
    """The harvested part: the encoder of an encoder-decoder, else the model itself."""
    if getattr(model.config, "is_encoder_decoder", False):
        return model.get_encoder()  # type: ignore[operator, no-any-return]
    return model


def takes_text(base: nn.Module, located: Located) -> nn.Module:
    """Return the model. Raises ModelError if its forward pass takes no token ids."""
    taken = inspect.signature(base.forward).parameters
    if "input_ids" not in taken and not any(p.kind is p.VAR_KEYWORD and len(taken) == 1 for p in taken.values()):
        raise ModelError(
            f"{located.name}: {type(base).__name__} takes {next(iter(taken), 'nothing')}, not the token ids of a text; "
            "give a model that reads text"
        )
    return base


def n_layers(located: Located, base: nn.Module | None) -> int | None:
    """Number of blocks according to the config, if it says so."""
    config = getattr(base, "config", located.config) if located.is_encoder_decoder else located.text_config
    names = ("encoder_layers", "num_layers") if located.is_encoder_decoder else ()
    counts = (getattr(config, name, None) for name in (*names, "num_hidden_layers"))  # LXMERT: a mapping of three
    return next((int(count) for count in counts if isinstance(count, int) and count > 0), None)


def max_positions(located: Located, base: nn.Module) -> int | None:
    """Longest context that the position embeddings allow; None if there is no such limit."""
    from torch import nn

    limit = next(
        (value for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
         if isinstance(value := getattr(located.text_config, name, None), int) and value > 0),
        None,
    )  # fmt: skip
    if limit is None:
        return None
    for path, module in base.named_modules():  # RoBERTa counts positions from padding_idx + 1
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return limit - module.padding_idx - 1
    if getattr(located.text_config, "relative_attention_num_buckets", None):
        return None  # T5's relative positions: n_positions is only where training stopped
    return limit


def probe_skeleton(base: nn.Module, hooks: Sequence[Hook]) -> tuple[Hook, ...] | None:
    """Widths of the hooks from shapes alone; None when the model cannot run without weights."""
    return _without_weights(base, lambda: probe(base, hooks, "meta"))


def run_skeleton(base: nn.Module) -> dict[str, Seen] | None:
    """Every module that runs on text and gives one vector per token; None when the model cannot run without weights."""
    return _without_weights(base, lambda: probe_all(base, "meta"))


def _without_weights(base: nn.Module, run: Callable[[], T]) -> T | None:
    """Result of `run` on a skeleton, in the first number format in which it runs."""
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        base.to(dtype)
        try:
            return run()
        except GranaryError:
            raise
        except Exception:  # of another's code, for which the meta device is one more surprise
            continue
    return None


def guess_widths(hooks: Sequence[Hook], located: Located) -> tuple[Hook, ...]:
    """Widths for plans of models that cannot run without weights: the hidden size at every hook point."""
    width = int(getattr(located.text_config, "hidden_size", 0) or getattr(located.text_config, "d_model", 0) or 1)
    return tuple(replace(hook, d_in=width) for hook in hooks)


def load_base(located: Located, compute_dtype: str, device: str) -> nn.Module:
    """Load the base model with its weights on the device, or where its placement says, in evaluation mode."""
    placed = located.placement.arguments(device, compute_dtype)
    kwargs = {**_config(located), **located.kwargs_of("model"), **placed}
    try:
        with LOADING:
            model, info = from_pretrained(_model_class(located), located, compute_dtype, **kwargs)
    except LOAD_ERRORS as error:
        raise ModelError(f"{located.name} cannot be loaded: {one_line(error)}") from error
    check_loaded(located, info)
    return located.placement.placed(takes_text(base_model(frozen(model)), located), device)


def from_pretrained(kind: Any, located: Located, dtype: str, **kwargs: Any) -> Any:
    """A model of this class, and what of it the checkpoint lacks or has in other shapes: to be refused by name."""
    import torch

    options = {"dtype": getattr(torch, dtype), "output_loading_info": True, "ignore_mismatched_sizes": True}
    return kind.from_pretrained(located.source, **options, **kwargs)


def _config(located: Located) -> dict[str, Any]:
    """The config; the one that a Sentence-Transformer modified, where it does."""
    changed = located.kwargs.get("config") or located.kwargs.get("model")
    return {"config": copy.deepcopy(located.config)} if changed else {}


def frozen(model: Any) -> nn.Module:
    """Put the model in evaluation mode, without gradients and without a key-value cache."""
    text_config = getattr(model.config, "get_text_config", lambda: model.config)()
    for config in (model.config, text_config):
        if hasattr(config, "use_cache"):
            config.use_cache = False
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def check_loaded(located: Located, info: Any) -> None:
    """Refuse a checkpoint that leaves part of the model with random weights."""
    missing = sorted(key for key in info.get("missing_keys", ()) if not _UNUSED.search(key))
    if located.is_encoder_decoder:
        missing = [key for key in missing if key.startswith("encoder.")]
    mismatched = info.get("mismatched_keys") or ()
    if missing or mismatched:
        names = missing or [str(item[0]) for item in mismatched]
        raise ModelError(
            f"the weights of {located.name} do not fit its config: {names[0]} and {len(names) - 1} more are missing or "
            "of another shape; a harvest would store the output of random weights"
        )


def flops_per_token(base: nn.Module, hooks: Sequence[Hook]) -> float:
    """FLOPs per token: two per matrix parameter up to the last hooked module; no embeddings, no attention scores."""
    from torch import nn

    paths = [path for path, _ in base.named_modules()]
    last = max(
        (i for hook in hooks for i, path in enumerate(paths) if (path + ".").startswith(hook.module + ".")), default=0
    )
    reached = set(paths[: last + 1])
    modules = [m for path, m in base.named_modules() if path in reached and not isinstance(m, nn.Embedding)]
    weights = [module.weight for module in modules if getattr(getattr(module, "weight", None), "ndim", 0) >= 2]
    return 2.0 * sum(int(weight.numel()) for weight in weights)


def model_record(located: Located, model_class: str | None, layers: int | None) -> dict[str, Any]:
    """The model's entry in the provenance."""
    config = located.text_config if located.config is not None else None
    decoder = located.config is not None and located.is_decoder
    return {
        "id": located.model_id,
        "revision": located.revision,
        "kind": located.kind,
        "model_type": getattr(config, "model_type", None),
        "class": model_class,
        "family": "encoder-decoder" if located.is_encoder_decoder else "decoder" if decoder else "encoder",
        "is_decoder": decoder,
        "n_layers": layers,
        "subfolder": located.subfolder or None,
        "trust_remote_code": located.trust_remote_code,
        **located.placement.record(),
    }
