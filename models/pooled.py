"""`--unit text`: one row per text, exactly what `SentenceTransformer.encode` returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_granary.common.errors import one_line
from sae_granary.models.behavior.checks import USUAL, Behavior, failure, observe_texts
from sae_granary.models.behavior.state import State, unchanged
from sae_granary.models.errors import LOAD_ERRORS, MemoryLimitError, ModelError
from sae_granary.models.forward import Say, Tick, Work
from sae_granary.models.hooks import Hook
from sae_granary.models.load import LOADING
from sae_granary.models.locate import Located, read_json
from sae_granary.models.tokens.contexts import Buffer, IntArray, WindowRules

if TYPE_CHECKING:
    import torch

HOOK_NAME = "sentence_embedding"
BUFFER_TEXTS = 2048
TEXT_RULES = WindowRules(ctx_len=1)  # a text is one row: a window of one pretended token
_DEFAULT_LENGTH, _NO_LIMIT = 512, 10**7  # where the model tells none; where it is infinite
_CHARS_PER_TOKEN = 3  # low for English, so that a batch is rather too small than too large


def pretend_tokens(texts: Sequence[str]) -> list[IntArray]:
    """One token per text: its row."""
    return [np.full(1, -1, np.int32) for _ in texts]


def pooled_hook(located: Located) -> Hook:
    """The pooled embedding's hook point, with its width if the configs give it (0: only the loaded model knows)."""
    return Hook(HOOK_NAME, "", d_in=_width(located))


def _width(located: Located) -> int:
    width = int(getattr(located.text_config, "hidden_size", 0) or 0) if located.config is not None else 0
    if not located.is_local:
        return 0
    for module in located.modules[1:]:
        config_file = Path(located.source) / module["path"] / "config.json"
        if not module["path"] or not config_file.is_file():
            continue
        config = read_json(config_file, located)
        if not isinstance(config, dict):
            raise ModelError(f"{located.name}: {module['path']}/config.json is not a JSON object")
        if module["type"].endswith("Pooling"):
            modes = sum(bool(value) for name, value in config.items() if name.startswith("pooling_mode_"))
            if "pooling_mode" in config:  # the newer spelling: a name or a list of names
                modes = len(config["pooling_mode"]) if isinstance(config["pooling_mode"], list) else 1
            width *= max(1, modes)
        elif module["type"].endswith("Dense"):
            width = int(config.get("out_features", 0))
        elif not module["type"].endswith(("Normalize", "Dropout", "LayerNorm")):
            return 0
    return min(width, located.truncate_dim or width)


class TextModel:
    """A Sentence-Transformer: buffers of texts -> {"sentence_embedding": (N, D)}."""

    def __init__(
        self, model: Any, d_in: int, device: str, *, batch_tokens: int, say: Say, behavior: Behavior = USUAL
    ) -> None:
        import torch

        self.device = torch.device(device)
        self._model = model
        self._d_in = d_in
        self._batch_tokens = 1 if behavior.batching == "single" else batch_tokens
        self._max_len = longest_text(model)
        self._put_back: Callable[[], None] = State(model).restore if behavior.changed else lambda: None
        self._share = 1.0  # of a planned batch that fits the memory
        self._say = say

    def prepare(self, buffer: Buffer) -> Work:
        """Sort texts by length in characters and cut them into batches by a token budget."""
        lengths = np.array([len(window.documents[0].text) for window in buffer.windows])
        order = np.argsort(-lengths, kind="stable")
        tokens = np.minimum(self._max_len, lengths // _CHARS_PER_TOKEN + 2)
        batches, start = [], 0
        while start < len(order):
            size = max(1, self._batch_tokens // int(tokens[order[start]]))
            batches.append(order[start : start + size])
            start += size
        return Work(buffer, batches, buffer.n_rows)

    def __call__(self, work: Work, tick: Tick) -> dict[str, torch.Tensor]:
        """Embeddings of the buffer's texts, in source order."""
        import torch

        out = torch.empty((work.buffer.n_rows, self._d_in), dtype=torch.float32, device=self.device)
        with torch.inference_mode():
            for members in work.batches:
                texts = [work.buffer.windows[i].documents[0].text for i in members]
                out[torch.from_numpy(members).to(self.device)] = self._encode(texts)
                tick(len(members))
        return {HOOK_NAME: out}

    def _encode(self, texts: list[str]) -> torch.Tensor:
        import torch

        size = max(1, int(len(texts) * self._share))
        try:
            found = self._model.encode(texts, batch_size=size, convert_to_tensor=True, show_progress_bar=False)
            return found.to(torch.float32)  # type: ignore[no-any-return]
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise MemoryLimitError(f"one text does not fit the memory of {self.device}") from error
        except Exception as error:  # of the model's code, which may be anyone's
            raise ModelError(f"the model failed on {len(texts):,} texts: {failure(error)}") from error
        finally:
            self._put_back()
        self._share /= 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._say(f"out of memory with a batch of {size:,} texts: going on with {max(1, size // 2):,}")
        return self._encode(texts)


def load_pooled(located: Located, compute_dtype: str, device: str) -> Any:
    """Load the Sentence-Transformer; a plain transformer gets mean pooling, as the library does."""
    import torch
    from sentence_transformers import SentenceTransformer

    kwargs: dict[str, Any] = {"trust_remote_code": located.trust_remote_code, "device": device}
    if not located.is_local:
        kwargs |= {"revision": located.revision, "local_files_only": located.local_only}
    try:
        with LOADING:
            dtype = {"dtype": getattr(torch, compute_dtype)}
            model = SentenceTransformer(located.source, model_kwargs=dtype, **kwargs)
    except LOAD_ERRORS as error:
        raise ModelError(f"{located.name} cannot be loaded as a Sentence-Transformer: {one_line(error)}") from error
    tokenizer: Any = getattr(model, "tokenizer", None)
    if getattr(tokenizer, "pad_token", "") is None:  # any will do: it is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return model.eval()


def longest_text(model: Any) -> int:
    """Maximum number of tokens of a text that a loaded Sentence-Transformer reads; sets batch sizes."""
    limit = getattr(model, "max_seq_length", None)
    return int(min(limit, _NO_LIMIT)) if limit else _DEFAULT_LENGTH


def pooled_width(model: Any) -> int:
    """Embedding width of a loaded Sentence-Transformer, which stays unchanged. Raises ModelError."""
    try:
        with unchanged(model):
            return int(model.encode(["a"], convert_to_tensor=True, show_progress_bar=False).shape[-1])
    except Exception as error:  # of the model's code, which may be anyone's
        raise ModelError(f"the Sentence-Transformer cannot embed a text: {failure(error)}") from error


def observe_pooled(model: Any, batch_tokens: int) -> Behavior:
    """Whether a text's embedding depends on the other texts of its batch, and whether embedding changes the model."""

    def encode(texts: Sequence[str]) -> torch.Tensor:
        return model.encode(  # type: ignore[no-any-return]
            list(texts), batch_size=len(texts), convert_to_tensor=True, show_progress_bar=False
        )

    return observe_texts(model, encode, max(2, min(longest_text(model), batch_tokens // 2)))
