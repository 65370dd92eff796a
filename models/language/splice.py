"""The model of a cache, to splice an SAE into: found again by the manifest, checked and frozen.

Everything that can be wrong is told before a run's folder exists: the model is missing, of another revision or with
other weights, without a head, or it gives other activations than the cache holds.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from torch import Tensor, nn

from sae_granary.cache.load.whole_contexts import read_contexts
from sae_granary.common.errors import one_line
from sae_granary.models.language.demo import resolve_demo
from sae_granary.models.language.language_model import EmbeddingModel, HookedModel, LanguageModel
from sae_granary.models.language.weights import weights_hash
from sae_granary.train.errors import SpliceError

if TYPE_CHECKING:
    from sae_granary.cache.read.reader import Cache

H = TypeVar("H", bound=HookedModel)

MAX_DIFFERENCE = 0.1  # of a row's length: bfloat16 and other batches stay below 0.03, another model is near 1
REMEDY = "name its hub id or folder with --lm"
SENTENCE_TRANSFORMER = "sentence-transformer"
_CHECKED_ROWS = 256
_LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError)
_CAUSAL, _MASKED = ("ForCausalLM", "LMHeadModel"), ("ForMaskedLM", "MaskedLMHeadModel")
_UNUSED = ("pooler.",)  # weights that no splice needs
# Models that some run holds: the runs of a sweep share one.
_IN_USE: weakref.WeakValueDictionary[tuple[str, ...], nn.Module] = weakref.WeakValueDictionary()


def open_model(
    cache: Cache, hook: str | None = None, *, lm: str | None = None, device: str = "cpu", dtype: str = "float32"
) -> LanguageModel:
    """The model that a cache was harvested from, with its language-model head, for an SAE at a hook point.

    `lm` says where it is if not where the harvest found it. Raises SpliceError, or SelectionError for a cache of texts.
    """
    record = _record(cache)
    if record.get("kind") == SENTENCE_TRANSFORMER:
        raise SpliceError(
            f"{record.get('id')} is a Sentence-Transformer: it has no language-model head, so no kl or ce; train with "
            "--loss fvu, or on a cache harvested from a model with a head"
        )
    source = _Source.find(record, lm)
    kind = transformers.AutoModelForCausalLM if source.is_causal else transformers.AutoModelForMaskedLM
    model = source.load(kind, dtype, device)
    mask_id = None if source.is_causal else source.mask_id()
    return _checked(LanguageModel(model, *source.place(model, cache, hook, device), mask_id), cache, source)


def open_embedder(
    cache: Cache, hook: str | None = None, *, lm: str | None = None, device: str = "cpu", dtype: str = "float32"
) -> EmbeddingModel:
    """The Sentence-Transformer that a cache of tokens was harvested from; arguments and errors as `open_model`."""
    source = _Source.find(_record(cache), lm)
    cls_pooling = source.pools_first_token()
    model = source.load(transformers.AutoModel, dtype, device)
    return _checked(EmbeddingModel(model, *source.place(model, cache, hook, device), cls_pooling), cache, source)


def open_any(
    cache: Cache, hook: str | None = None, *, lm: str | None = None, device: str = "cpu", dtype: str = "float32"
) -> LanguageModel | EmbeddingModel:
    """What `downstream` measures with: the language model, or the Sentence-Transformer."""
    opens = open_embedder if _record(cache).get("kind") == SENTENCE_TRANSFORMER else open_model
    return opens(cache, hook, lm=lm, device=device, dtype=dtype)


def _record(cache: Cache) -> Mapping[str, Any]:
    """What the manifest says about the model; refuses what nothing can be spliced into."""
    record: Mapping[str, Any] = cache.manifest.provenance.get("model", {})
    read_contexts(cache, next(iter(cache.hook_points)), batch_rows=1)  # refuses a cache of texts
    name = record.get("id")
    if record.get("family") == "encoder-decoder":
        raise SpliceError(f"{name} is an encoder-decoder, of which the cache holds the encoder: no kl or ce through it")
    if record.get("trust_remote_code"):
        raise SpliceError(f"{name} runs its own code, which sae-train does not: no kl or ce through it")
    return record


@dataclass(frozen=True)
class _Source:
    """Where the model's files are."""

    where: str  # folder or hub id
    kwargs: Mapping[str, Any]  # of every from_pretrained
    config: Any
    record: Mapping[str, Any]

    @classmethod
    def find(cls, record: Mapping[str, Any], lm: str | None) -> _Source:
        """The folder or hub model with its config; the local copy of a hub model if there is one."""
        was_local = lm is None and record.get("weights_xxh3") is not None
        lm = resolve_demo(lm, str(record.get("id")), was_local=was_local)
        name = lm or str(record.get("id"))
        wanted = f"the model {name!r}" + ("" if lm else " that the cache was harvested from")
        folder = Path(name).expanduser()
        is_path = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
        if not folder.is_dir() and (is_path or was_local):
            raise SpliceError(f"{wanted} is not there: no such folder; {REMEDY}")
        subfolder = {"subfolder": record["subfolder"]} if record.get("subfolder") else {}
        revision = {"revision": record.get("revision")} if name == record.get("id") else {}
        attempts = [subfolder, {}] if folder.is_dir() else [{**subfolder, **revision, "local_files_only": True}]
        attempts += [] if folder.is_dir() else [{**subfolder, **revision}]
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        where, problem = str(folder) if folder.is_dir() else name, ""
        for kwargs in attempts:
            try:
                config = transformers.AutoConfig.from_pretrained(where, **kwargs)
            except _LOAD_ERRORS as error:
                problem = one_line(error)
            else:
                return cls(where, kwargs, config, record)
        raise SpliceError(f"{wanted} cannot be found ({problem}); {REMEDY}")

    @property
    def is_causal(self) -> bool:
        """Whether the head predicts the next token: by the config's architectures, else by what was harvested."""
        names = [str(name) for name in getattr(self.config, "architectures", None) or ()]
        if any(name.endswith(_CAUSAL) for name in names):
            return True
        return not any(name.endswith(_MASKED) for name in names) and bool(self.record.get("is_decoder"))

    def load(self, kind: Any, dtype: str, device: str) -> nn.Module:
        """The frozen model in evaluation mode; one in use is not loaded again. Refuses other weights."""
        found = weights_hash(Path(self.where)) if Path(self.where).is_dir() else None
        wanted = self.record.get("weights_xxh3")
        if wanted and found and found != wanted:
            raise SpliceError(
                f"{self.where} has other weights ({found}) than the model that the cache was harvested from "
                f"({wanted}): {REMEDY}, or harvest again"
            )
        key = (kind.__name__, self.where, str(self.kwargs), str(found), dtype, device)
        model = _IN_USE.get(key)
        if model is None:
            model = _IN_USE[key] = self._load(kind, dtype).to(device)
        return model

    def _load(self, kind: Any, dtype: str) -> nn.Module:
        """Refuses a part with random weights."""
        try:
            model, info = kind.from_pretrained(
                self.where, dtype=getattr(torch, dtype), output_loading_info=True, **self.kwargs
            )
        except _LOAD_ERRORS as error:
            raise SpliceError(
                f"{self.where} has no language-model head that can be loaded: {one_line(error)}"
            ) from None
        missing = [str(key) for name in ("missing_keys", "mismatched_keys") for key in sorted(info.get(name) or ())]
        missing = [key for key in missing if not key.startswith(_UNUSED)]
        if missing:
            raise SpliceError(
                f"{self.where} has no language-model head: {missing[0]} and {len(missing) - 1} more would be random; "
                "kl, ce and --eval-downstream need the model with its head"
            )
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False
        frozen: nn.Module = model.eval().requires_grad_(False)
        return frozen

    def place(self, model: nn.Module, cache: Cache, hook: str | None, device: str) -> tuple[Any, Any, torch.device]:
        """(module, hook point, device) of an SAE in the model."""
        point = cache.hook_points[cache.hook_name(hook)]
        try:
            module = getattr(model, "base_model", model).get_submodule(point.module)
        except AttributeError:
            raise SpliceError(f"{self.where} has no module {point.module!r}, where the cache was harvested") from None
        return module, point, torch.device(device)

    def mask_id(self) -> int:
        """The token that stands for one to be predicted."""
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.where, **self.kwargs)
        except _LOAD_ERRORS as error:
            raise SpliceError(f"the tokenizer of {self.where} cannot be loaded: {one_line(error)}") from None
        if tokenizer.mask_token_id is None:
            raise SpliceError(f"{self.where} has no [MASK] token: no masked-language-model loss through it")
        return int(tokenizer.mask_token_id)

    def pools_first_token(self) -> bool:
        """Of a Sentence-Transformer: cls or mean pooling; refuses any other, and modules that change the direction."""
        modules = self._json("modules.json")
        kinds = {str(m["type"]).rsplit(".", 1)[-1]: str(m.get("path", "")) for m in modules}
        config = self._json(f"{kinds['Pooling']}/config.json") if "Pooling" in kinds else {}
        modes = {name.removeprefix("pooling_mode_") for name, on in config.items() if on is True}
        modes = modes & {"cls_token", "mean_tokens", "max_tokens"} or {str(config.get("pooling_mode"))}
        if kinds.keys() - {"Transformer", "Pooling", "Normalize"} or not modes <= {
            "cls_token",
            "cls",
            "mean_tokens",
            "mean",
        }:
            raise SpliceError(
                f"{self.where}: --eval-downstream knows Sentence-Transformers of mean or cls pooling only"
            )
        return bool(modes & {"cls_token", "cls"})

    def _json(self, name: str) -> Any:
        kwargs = {key: value for key, value in self.kwargs.items() if key != "subfolder"}
        try:
            return json.loads(Path(transformers.utils.cached_file(self.where, name, **kwargs)).read_text("utf-8"))
        except (*_LOAD_ERRORS, TypeError) as error:
            raise SpliceError(f"{name} of {self.where} cannot be read: {one_line(error)}") from None


@torch.no_grad()
def _checked(hooked: H, cache: Cache, source: _Source) -> H:
    """Refuse a model that gives other activations than those stored: whatever is different, no loss would mean much."""
    point = hooked.point
    windows = next(iter(read_contexts(cache, point.name, batch_rows=_CHECKED_ROWS, part="all", epochs=1)))
    tokens = hooked.plain(windows)
    seen: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        seen.append(x[tokens.keep].float().cpu())
        return x

    hooked.run(tokens, look)
    stored = torch.from_numpy(cache.hook(point.name)[windows.row[windows.keep]].astype("float32"))
    difference = float(((seen[0] - stored).norm(dim=1) / stored.norm(dim=1).clamp_min(1e-12)).median())
    if not difference < MAX_DIFFERENCE:
        raise SpliceError(
            f"{source.where} gives other activations at {point.module} than the cache holds (they differ by "
            f"{difference:.0%} of their length): it is another model or revision; {REMEDY}"
        )
    return hooked
