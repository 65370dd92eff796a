"""The model that activations came from, opened again to splice an SAE into: found, checked and frozen.

Everything that can be wrong is told before a run's folder exists: the model is missing, of another revision or with
other weights, without a head, or it gives other activations than were stored.

The functions that open a model take what a cache knows about it (`cache.load.origin`): the record of the model in its
manifest, the hook point, and some contexts with the rows (N, D) that were stored for their kept tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sae_granary.common.errors import one_line
from sae_granary.common.rows import HookPoint
from sae_granary.models.errors import LOAD_ERRORS, SpliceError
from sae_granary.models.language.language_model import Contexts, EmbeddingModel, HookedModel, LanguageModel
from sae_granary.models.language.recorded import check_recorded_weights, locate_recorded, remedy
from sae_granary.models.load import LOADING, from_pretrained, frozen
from sae_granary.models.locate import SENTENCE_TRANSFORMER, Located, file_of, read_json
from sae_granary.models.tokens.tokenizer import load_tokenizer

H = TypeVar("H", bound=HookedModel)
FloatRows = NDArray[np.float32]

MAX_DIFFERENCE = 0.1  # of a row's length: bfloat16 and other batches stay below 0.03, another model is near 1
_CAUSAL, _MASKED = ("ForCausalLM", "LMHeadModel"), ("ForMaskedLM", "MaskedLMHeadModel")
_UNUSED = ("pooler.",)  # weights that no splice needs
_POOLING = {"cls_token": True, "cls": True, "mean_tokens": False, "mean": False}  # whether it takes the first token
# Models that some run holds: the runs of a sweep share one.
_IN_USE: weakref.WeakValueDictionary[tuple[str, ...], nn.Module] = weakref.WeakValueDictionary()


def open_model(
    record: Mapping[str, Any],
    point: HookPoint,
    contexts: Contexts,
    rows: FloatRows,
    *,
    lm: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    option: str = "--lm",
) -> LanguageModel:
    """The model that activations came from, with its language-model head, for an SAE at the hook point.

    `lm` says where it is if not where the harvest found it, `option` is the flag for that, for messages. Raises
    ModelError.
    """
    model, located, is_causal = load_with_head(record, lm, device=device, dtype=dtype, option=option)
    mask_id = None if is_causal else _mask_id(located)
    place = (model, _module(model, point, located), point, torch.device(device))
    return _checked(LanguageModel(*place, mask_id), contexts, rows, located, option)


def load_with_head(
    record: Mapping[str, Any], lm: str | None, *, device: str, dtype: str = "float32", option: str = "--lm"
) -> tuple[nn.Module, Located, bool]:
    """The frozen model of a record with its head, where it is, and whether the head predicts the next token.

    `option` is the flag that `lm` was given by. Raises ModelError.
    """
    _check_record(record)
    if record.get("kind") == SENTENCE_TRANSFORMER:
        raise SpliceError(
            f"{record.get('id')} is a Sentence-Transformer: it has no language-model head, so no kl or ce; train with "
            "--loss fvu, or on a cache harvested from a model with a head"
        )
    located = locate_recorded(record, lm, option)
    is_causal = _is_causal(located, record)
    kind = "AutoModelForCausalLM" if is_causal else "AutoModelForMaskedLM"
    return _load(located, record, kind, dtype, device, option), located, is_causal


def open_any(
    record: Mapping[str, Any],
    point: HookPoint,
    contexts: Contexts,
    rows: FloatRows,
    *,
    lm: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    option: str = "--lm",
) -> LanguageModel | EmbeddingModel:
    """What `losses.downstream` measures with: as `open_model`, but of a Sentence-Transformer what it pools."""
    if record.get("kind") != SENTENCE_TRANSFORMER:
        return open_model(record, point, contexts, rows, lm=lm, device=device, dtype=dtype, option=option)
    _check_record(record)
    located = locate_recorded(record, lm, option)
    cls_pooling = _pools_first_token(located)
    model = _load(located, record, "AutoModel", dtype, device, option)
    place = (model, _module(model, point, located), point, torch.device(device))
    return _checked(EmbeddingModel(*place, cls_pooling), contexts, rows, located, option)


def _check_record(record: Mapping[str, Any]) -> None:
    """Refuse models into which no SAE can be spliced."""
    name = record.get("id")
    if record.get("family") == "encoder-decoder":
        raise SpliceError(f"{name} is an encoder-decoder, of which the cache holds the encoder: no kl or ce through it")
    if record.get("trust_remote_code"):
        raise SpliceError(f"{name} runs its own code, which sae-train does not: no kl or ce through it")


def _is_causal(located: Located, record: Mapping[str, Any]) -> bool:
    """Whether the head predicts the next token: by the config's architectures, else by what was harvested."""
    names = [str(name) for name in getattr(located.config, "architectures", None) or ()]
    if any(name.endswith(_CAUSAL) for name in names):
        return True
    return not any(name.endswith(_MASKED) for name in names) and bool(record.get("is_decoder"))


def _load(located: Located, record: Mapping[str, Any], kind: str, dtype: str, device: str, option: str) -> nn.Module:
    """Load the frozen model, or reuse one that is loaded. Refuses other weights, and partly random ones."""
    found = check_recorded_weights(located, record, option)
    key = (kind, located.source, str(located.hub_kwargs), str(found), dtype, device)
    model = _IN_USE.get(key)
    if model is None:
        model = _IN_USE[key] = located.placement.placed(_with_head(located, kind, dtype, device), device)
    return model


def _with_head(located: Located, kind: str, dtype: str, device: str) -> nn.Module:
    import transformers  # a second, which many evaluations need no model for

    placed = located.placement.spread().arguments(device, dtype)
    try:
        with LOADING:
            kwargs = {**located.hub_kwargs, **placed}
            model, info = from_pretrained(getattr(transformers, kind), located, dtype, **kwargs)
    except LOAD_ERRORS as error:
        raise SpliceError(
            f"{located.source} has no language-model head that can be loaded: {one_line(error)}"
        ) from None
    missing = [*sorted(info.get("missing_keys") or ()), *sorted(key for key, *_ in info.get("mismatched_keys") or ())]
    missing = [key for key in missing if not key.startswith(_UNUSED)]
    if missing:
        raise SpliceError(
            f"{located.source} has no language-model head: {missing[0]} and {len(missing) - 1} more would be random; "
            "kl, ce and --eval-downstream need the model with its head"
        )
    return frozen(model)


def _module(model: nn.Module, point: HookPoint, located: Located) -> nn.Module:
    base: nn.Module = getattr(model, "base_model", model)
    try:
        return base.get_submodule(point.module)
    except AttributeError:
        raise SpliceError(f"{located.source} has no module {point.module!r}, where the cache was harvested") from None


def _mask_id(located: Located) -> int:
    """The id of the mask token."""
    tokenizer = load_tokenizer(located)
    if tokenizer.mask_token_id is None:
        raise SpliceError(f"{located.source} has no [MASK] token: no masked-language-model loss through it")
    return int(tokenizer.mask_token_id)


def _pools_first_token(located: Located) -> bool:
    """Of a Sentence-Transformer: cls or mean pooling; refuses any other, and modules that change the direction."""
    kinds = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in located.modules}
    file = file_of(located, f"{kinds['Pooling']}/config.json") if "Pooling" in kinds else None
    config = read_json(file, located) if file is not None else {}
    modes = {name.removeprefix("pooling_mode_") for name, on in config.items() if on is True}
    modes = modes & {"cls_token", "mean_tokens", "max_tokens"} or {str(config.get("pooling_mode"))}
    if kinds.keys() - {"Transformer", "Pooling", "Normalize"} or not modes <= _POOLING.keys():
        raise SpliceError(
            f"{located.source}: --eval-downstream knows Sentence-Transformers of mean or cls pooling only"
        )
    return any(_POOLING[mode] for mode in modes)


@torch.no_grad()
def _checked(hooked: H, contexts: Contexts, rows: FloatRows, located: Located, option: str) -> H:
    """Refuse a model whose activations differ from those stored: losses through it would be meaningless."""
    tokens = hooked.plain(contexts)
    seen: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        seen.append(x[tokens.keep].float().cpu())
        return x

    hooked.run(tokens, look)
    stored = torch.from_numpy(rows)
    difference = float(((seen[0] - stored).norm(dim=1) / stored.norm(dim=1).clamp_min(1e-12)).median())
    if not difference < MAX_DIFFERENCE:
        raise SpliceError(
            f"{located.source} gives other activations at {hooked.point.module} than the cache holds (they differ by "
            f"{difference:.0%} of their length): it is another model or revision; {remedy(option)}"
        )
    return hooked
