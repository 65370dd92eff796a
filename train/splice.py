"""The language model of a cache, to splice an SAE into: found again by the manifest, checked and frozen.

Everything that can be wrong is told before a run's folder exists: the model is missing, of another revision or with
other weights, without a head, or it gives other activations than the cache holds.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
import xxhash
from torch import Tensor, nn

from cache.windows import Windows, read_windows
from train.errors import SpliceError
from train.language_model import LanguageModel, Tokens

if TYPE_CHECKING:
    from cache.reader import Cache

MAX_DIFFERENCE = 0.1  # of a row's length: bfloat16 and other batches stay below 0.03, another model is near 1
_CHECKED_ROWS = 256
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError)
_CAUSAL, _MASKED = ("ForCausalLM", "LMHeadModel"), ("ForMaskedLM", "MaskedLMHeadModel")
# Models that some run holds: the runs of a sweep share one.
_IN_USE: weakref.WeakValueDictionary[tuple[str, ...], nn.Module] = weakref.WeakValueDictionary()
REMEDY = "name its hub id or folder with --lm"


def open_model(
    cache: Cache, hook: str | None = None, *, lm: str | None = None, device: str = "cpu", dtype: str = "float32"
) -> LanguageModel:
    """Load the model that a cache was harvested from, with its head, ready for an SAE at a hook point.

    `lm` says where it is if not where the harvest found it. Raises SpliceError, or SelectionError for a cache of texts.
    """
    record = dict(cache.manifest.provenance.get("model", {}))
    point = cache.hook_points[cache.hook_name(hook)]
    windows = next(iter(read_windows(cache, point.name, batch_rows=_CHECKED_ROWS, part="all", epochs=1)))
    _refuse_kinds(record)
    source = _Source.find(record, lm)
    source.check_weights(record)
    model, mask_id = source.load(source.is_causal(record), str(record.get("weights_xxh3")), dtype, device)
    try:
        module = getattr(model, "base_model", model).get_submodule(point.module)
    except AttributeError:
        raise SpliceError(f"{source.name} has no module {point.module!r}, where the cache was harvested") from None
    opened = LanguageModel(model, module, point, torch.device(device), mask_id)
    _compare(opened, cache, windows, source.name)
    return opened


def _refuse_kinds(record: Mapping[str, Any]) -> None:
    name = record.get("id")
    if record.get("kind") == "sentence-transformer":
        raise SpliceError(f"{name} is a Sentence-Transformer: it has no language-model head, so no kl or ce")
    if record.get("family") == "encoder-decoder":
        raise SpliceError(f"{name} is an encoder-decoder, of which the cache holds the encoder: no kl or ce through it")
    if record.get("trust_remote_code"):
        raise SpliceError(f"{name} runs its own code, which sae-train does not: no kl or ce through it")


@dataclass(frozen=True)
class _Source:
    """Where the model's files are."""

    name: str
    kwargs: Mapping[str, Any]
    config: Any

    @classmethod
    def find(cls, record: Mapping[str, Any], lm: str | None) -> _Source:
        """The folder or hub model with its config; the local copy of a hub model if there is one."""
        name = lm or str(record.get("id"))
        harvested = f"the language model {name!r}" + ("" if lm else " that the cache was harvested from")
        folder = Path(name).expanduser()
        local = record.get("weights_xxh3") is not None and lm is None
        is_path = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
        if not folder.is_dir() and (local or is_path):
            raise SpliceError(f"{harvested} is not there: no such folder; {REMEDY}")
        hub = {"revision": record.get("revision")} if name == record.get("id") else {}
        where = str(folder) if folder.is_dir() else name
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        attempts: list[dict[str, Any]] = [{}] if folder.is_dir() else [{**hub, "local_files_only": True}, hub]
        problem = ""
        for kwargs in attempts:
            try:
                config = transformers.AutoConfig.from_pretrained(where, **kwargs)
            except _LOAD_ERRORS as error:
                problem = _one_line(error)
            else:
                return cls(where, kwargs, config)
        raise SpliceError(f"{harvested} cannot be found ({problem}); {REMEDY}")

    def check_weights(self, record: Mapping[str, Any]) -> None:
        """Refuse weights of another hash where the cache knows it."""
        wanted = record.get("weights_xxh3")
        if wanted and Path(self.name).is_dir() and (got := weights_hash(Path(self.name))) != wanted:
            raise SpliceError(
                f"{self.name} has other weights ({got}) than the model that the cache was harvested from ({wanted}): "
                f"{REMEDY}, or harvest again"
            )

    def is_causal(self, record: Mapping[str, Any]) -> bool:
        """Whether the head predicts the next token: by the config's architectures, else by what was harvested."""
        names = [str(name) for name in getattr(self.config, "architectures", None) or ()]
        if any(name.endswith(_CAUSAL) for name in names):
            return True
        return not any(name.endswith(_MASKED) for name in names) and bool(record.get("is_decoder"))

    def load(self, causal: bool, weights: str, dtype: str, device: str) -> tuple[nn.Module, int | None]:
        """The frozen model in evaluation mode, and the id of its [MASK]; one in use is not loaded again."""
        key = (self.name, str(self.kwargs), weights, dtype, device)
        if (model := _IN_USE.get(key)) is None:
            model = _IN_USE[key] = self._load(causal, dtype).to(device)
        if causal:
            return model, None
        mask_id = transformers.AutoTokenizer.from_pretrained(self.name, **self.kwargs).mask_token_id
        if mask_id is None:
            raise SpliceError(f"{self.name} has no [MASK] token: no masked-language-model loss through it")
        return model, mask_id

    def _load(self, causal: bool, dtype: str) -> nn.Module:
        """Refuses a head with random weights."""
        kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
        try:
            model, info = kind.from_pretrained(
                self.name, dtype=getattr(torch, dtype), output_loading_info=True, **self.kwargs
            )
        except _LOAD_ERRORS as error:
            raise SpliceError(f"{self.name} cannot be loaded with a language-model head: {_one_line(error)}") from None
        missing = sorted(info.get("missing_keys", ())) or sorted(str(k) for k in info.get("mismatched_keys", ()))
        if missing:
            raise SpliceError(
                f"{self.name} has no language-model head: {missing[0]} and {len(missing) - 1} more would be random; "
                "kl, ce and --eval-downstream need the model with its head"
            )
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False
        frozen: nn.Module = model.eval().requires_grad_(False)
        return frozen


def weights_hash(folder: Path) -> str:
    """A hash over the weight files of a local model, as a harvest records it."""
    digest = xxhash.xxh3_128()
    found = [sorted(folder.glob(pattern)) for pattern in _WEIGHTS]
    for path in next((files for files in found if files), []):
        with path.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


@torch.no_grad()
def _compare(lm: LanguageModel, cache: Cache, windows: Windows, name: str) -> None:
    """Refuse a model that gives other activations than those stored: whatever is different, no loss would mean much."""
    seen: list[Tensor] = []
    nothing = torch.zeros(windows.real.shape, dtype=torch.bool, device=lm.device)
    unmasked = Tokens(
        torch.from_numpy(windows.token_id).to(lm.device),
        torch.from_numpy(windows.real).long().to(lm.device),
        keep=nothing,
        predicted=nothing,
        targets=torch.zeros(0),
    )

    def keep(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    lm.logits(unmasked, keep)
    live = seen[0][torch.from_numpy(windows.keep).to(lm.device)].float().cpu()
    stored = torch.from_numpy(cache.hook(lm.point.name)[windows.row[windows.keep]].astype("float32"))
    difference = float(((live - stored).norm(dim=1) / stored.norm(dim=1).clamp_min(1e-12)).median())
    if not difference < MAX_DIFFERENCE:
        raise SpliceError(
            f"{name} gives other activations at {lm.point.module} than the cache holds (they differ by "
            f"{difference:.0%} of their length): it is another model or revision; {REMEDY}"
        )


def _one_line(error: BaseException) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:200]
