"""Sort buffer -> activations at the hook points, in source order; contexts run in batches of similar length."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_granary.common.errors import GranaryError
from sae_granary.models.behavior.checks import USUAL, Behavior, failure, observe, pad_id_for, probe_windows
from sae_granary.models.behavior.state import State
from sae_granary.models.device.compiled import compile_blocks, no_recompiling
from sae_granary.models.errors import HookError, MemoryLimitError, ModelError
from sae_granary.models.hooks import Capture, Hook, tensor_of, vocabulary_size
from sae_granary.models.tokens.batches import TokenBatch, collate, plan_batches
from sae_granary.models.tokens.contexts import Buffer, WindowRules

if TYPE_CHECKING:
    import torch
    from torch import nn

Tick = Callable[[int], None]  # called after each batch with its number of rows; may raise to stop
Say = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """A buffer with its batches, ready for the device."""

    buffer: Buffer
    batches: Sequence[Any]  # what the model of the unit takes
    n_places: int  # of all batches, padding included


@dataclass(frozen=True)
class DeviceBatch:
    """A TokenBatch as tensors; `members` are its contexts' indices in the buffer."""

    members: np.ndarray[Any, np.dtype[np.int64]]
    input_ids: torch.Tensor  # (S, T)
    attention_mask: torch.Tensor | None  # (S, T)
    flat: torch.Tensor  # (n,)
    rows: torch.Tensor  # (n,)


def hooked_model(
    base: nn.Module,
    hooks: Sequence[Hook],
    tokenizer: Any,
    rules: WindowRules,
    *,
    device: str,
    batch_tokens: int,
    name: str,
    say: Say,
) -> TokenModel:
    """A loaded model with its hook points, batched so that a context's rows do not depend on other contexts.

    Raises ModelError if the model cannot run on text.
    """
    pad_id = pad_id_for(base, tokenizer.pad_token_id)
    n_ids = min(len(tokenizer), vocabulary_size(base) or len(tokenizer))
    unusual = rules.special_ids | frozenset(getattr(tokenizer, "added_tokens_decoder", {}))
    windows = probe_windows(rules.prefix, rules.suffix, rules.ctx_len, n_ids, unusual)
    sizes = {"ctx_len": rules.ctx_len, "batch_tokens": batch_tokens}
    behavior = observe(base, hooks, windows, pad_id=pad_id, name=name, **sizes)
    return TokenModel(base, hooks, device, batch_tokens=batch_tokens, pad_id=pad_id, say=say, behavior=behavior)


class TokenModel:
    """The base model with its hook points. Call it with a buffer: {hook name: (N, D) on the device}."""

    def __init__(
        self,
        base: nn.Module,
        hooks: Sequence[Hook],
        device: str,
        *,
        batch_tokens: int,
        pad_id: int,
        say: Say,
        behavior: Behavior = USUAL,
    ) -> None:
        import torch

        self.device, self.behavior = torch.device(device), behavior
        self._hooks = tuple(hooks)
        self._base, self._capture = base, Capture(base, hooks)
        self._running: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        self._dtype = next(base.parameters()).dtype
        self._batch_tokens = 1 if behavior.batching == "single" else batch_tokens
        self._limit = self._batch_tokens  # halved when memory runs out
        self._put_back: Callable[[], None] = State(base).restore if behavior.changed else lambda: None
        self._pad_id = pad_id
        self._say = say

    def compile(self, blocks: Sequence[str], ctx_len: int) -> None:
        """Compile these blocks once, for all batches. Raises ModelError."""
        compile_blocks(self._base, blocks, self._capture, str(self.device), ctx_len)
        self._running = no_recompiling
        if self.behavior.changed:
            self._put_back = State(self._base).restore

    def prepare(self, buffer: Buffer) -> Work:
        """Batches of a buffer; called in a background thread."""
        members = self._plan([len(window) for window in buffer.windows], self._batch_tokens)
        starts = first_rows(buffer)
        batches = [self._on_host(buffer, index, starts) for index in members]
        return Work(buffer, batches, sum(batch.input_ids.numel() for batch in batches))

    def __call__(self, work: Work, tick: Tick) -> dict[str, torch.Tensor]:
        """Activations of every row of the buffer, in source order."""
        import torch

        n_rows = work.buffer.n_rows
        out = {
            hook.name: torch.empty((n_rows, hook.d_in), dtype=self._dtype, device=self.device) for hook in self._hooks
        }
        with torch.inference_mode(), self._running():
            for batch in work.batches:
                self._run(work.buffer, batch, out)
                tick(len(batch.rows))
        return out

    def _run(self, buffer: Buffer, batch: DeviceBatch, out: dict[str, torch.Tensor]) -> None:
        """Run one batch, in parts if it exceeds the device's memory."""
        if batch.input_ids.numel() > self._limit and len(batch.members) > 1:
            for part in self._split(buffer, batch):
                self._run(buffer, part, out)
            return
        import torch

        try:
            self._forward(batch, out)
            return
        except torch.OutOfMemoryError as error:
            if len(batch.members) == 1:
                raise MemoryLimitError(
                    f"one window of {batch.input_ids.shape[1]} tokens does not fit the memory of {self.device}: "
                    "use a smaller --ctx-len, --compute-dtype bfloat16, or another --device"
                ) from error
        except GranaryError:
            raise
        except Exception as error:  # of the model's code, which may be anyone's
            shape = " x ".join(map(str, batch.input_ids.shape))
            raise ModelError(f"the model failed on a batch of {shape} tokens: {failure(error)}") from error
        finally:
            self._put_back()
        self._limit = batch.input_ids.numel() // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._say(f"out of memory with a batch of {batch.input_ids.numel():,} tokens: going on with {self._limit:,}")
        self._run(buffer, batch, out)

    def _split(self, buffer: Buffer, batch: DeviceBatch) -> list[DeviceBatch]:
        starts = first_rows(buffer)
        parts = self._plan([len(buffer.windows[i]) for i in batch.members], self._limit)
        return [self._on_host(buffer, batch.members[part], starts) for part in parts]

    def _plan(self, lengths: Sequence[int], batch_tokens: int) -> Sequence[Any]:
        padded = self.behavior.batching == "padded"
        return plan_batches(lengths, batch_tokens, padded=padded, multiple=self.behavior.multiple)

    def _forward(self, batch: DeviceBatch, out: dict[str, torch.Tensor]) -> None:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self.device, non_blocking=True)

        flat, rows = move(batch.flat), move(batch.rows)
        shape = tuple(batch.input_ids.shape)

        def sink(hook: Hook, value: Any) -> None:
            found = rows_of(hook, value, shape, flat)
            out[hook.name].index_copy_(0, rows, found.to(self.device, self._dtype))

        mask = None if batch.attention_mask is None else move(batch.attention_mask)
        self._capture.run(move(batch.input_ids), mask, sink)

    def _on_host(self, buffer: Buffer, members: Any, starts: Sequence[int]) -> DeviceBatch:
        import torch

        batch: TokenBatch = collate(buffer.windows, members, starts, self._pad_id, self.behavior.multiple)

        def tensor(array: Any) -> torch.Tensor:
            host = torch.from_numpy(array)
            return host.pin_memory() if self.device.type == "cuda" else host

        mask = None if batch.attention_mask is None else tensor(batch.attention_mask)
        return DeviceBatch(members, tensor(batch.input_ids), mask, tensor(batch.flat), tensor(batch.rows))


def first_rows(buffer: Buffer) -> list[int]:
    """The row of the buffer where each window starts."""
    return [0, *np.cumsum([len(window) for window in buffer.windows]).tolist()[:-1]]


def rows_of(hook: Hook, value: Any, shape: tuple[int, ...], flat: torch.Tensor) -> torch.Tensor:
    """Vectors (n, D) of the real tokens in a hooked tensor: (S, T, D), (S*T, D), or already without padding."""
    tensor, _ = tensor_of(value)
    if tensor is not None and hook.time_first and tensor.ndim == 3:
        tensor = tensor.transpose(0, 1)
    if tensor is not None and tensor.shape[-1] == hook.d_in:
        vectors, places = tensor.reshape(-1, hook.d_in), tuple(tensor.shape[:-1])
        if places in (shape, (shape[0] * shape[1],)):
            # accelerate may have put this module on another GPU
            return vectors.index_select(0, flat.to(tensor.device))  # type: ignore[no-any-return]
        if places in ((1, len(flat)), (len(flat),)):
            return vectors  # type: ignore[no-any-return]
    got = "no tensor" if tensor is None else f"a tensor of shape {tuple(tensor.shape)}"
    raise HookError(
        f"{hook.module} ({hook.side}) gave {got} for a batch of {shape[0]} x {shape[1]} tokens: "
        f"expected one vector of {hook.d_in} per token"
    )
