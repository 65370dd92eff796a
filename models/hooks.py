"""Reading activations at the modules of a model; probing what a module returns with two tiny passes.

Module paths are relative to the base model (of an encoder-decoder: to its encoder). Everything here also works on a
model on the meta device, without weights. Shapes: S sequences, T tokens, D = d_in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from sae_granary.common.rows import HookPoint
from sae_granary.models.errors import HookError

if TYPE_CHECKING:
    import torch
    from torch import nn

_LENGTHS = (5, 7)  # tokens of 2 and 3 sequences: no number, and no product, could be taken for another


@dataclass(frozen=True)
class Hook:
    """One hook point of a model; `d_in` is 0 and `tuple_index` None until the model has been probed."""

    name: str
    module: str
    side: Literal["output", "input"] = "output"
    tuple_index: int | None = None
    d_in: int = 0
    time_first: bool = False  # the module gives (T, S, D) instead of (S, T, D)

    def point(self) -> HookPoint:
        """The hook point as the cache records it."""
        return HookPoint(self.name, self.module, self.side, self.tuple_index, self.d_in)


class StopForward(Exception):
    """Raised to end a forward pass after the last hooked module."""


class Capture:
    """Run a model up to the last hooked module, and pass each hooked tensor to `sink` as it appears.

    The sink must copy: later modules may modify the tensor in place. Only a module's first call in a pass counts.
    """

    def __init__(self, base: nn.Module, hooks: Sequence[Hook]) -> None:
        self._base = base
        self._hooks = tuple(hooks)
        self._open: dict[str, Hook] = {}
        self._sink: Callable[[Hook, Any], None] = lambda hook, value: None
        self._handles = [self._register(hook) for hook in self._hooks]

    def run(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, sink: Callable[[Hook, Any], None]
    ) -> None:
        """One forward pass."""
        self._open, self._sink = {hook.name: hook for hook in self._hooks}, sink
        kwargs = {} if attention_mask is None else {"attention_mask": attention_mask}
        with contextlib.suppress(StopForward):
            self._base(input_ids=input_ids, **kwargs)
        if self._open:
            raise HookError(
                f"{', '.join(hook.module for hook in self._open.values())} did not run in the forward pass of "
                f"{type(self._base).__name__}: it cannot be harvested"
            )

    def close(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def _register(self, hook: Hook) -> Any:
        module = self._base.get_submodule(hook.module)
        if hook.side == "input":

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._take(hook, args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None)))

            return module.register_forward_pre_hook(before, with_kwargs=True)

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._take(hook, output)

        return module.register_forward_hook(after)

    def _take(self, hook: Hook, value: Any) -> None:
        if self._open.pop(hook.name, None) is None:
            return
        self._sink(hook, value)
        if not self._open:
            raise StopForward


def tensor_of(value: Any) -> tuple[Any, int | None]:
    """Return (tensor of a module's output, its index in a tuple output); (None, None) if there is none."""
    import torch

    if isinstance(value, torch.Tensor):
        return value, None
    if isinstance(value, tuple | list) and value and isinstance(value[0], torch.Tensor):
        return value[0], 0
    first = getattr(value, "last_hidden_state", None)
    return (first, 0) if isinstance(first, torch.Tensor) else (None, None)


@dataclass(frozen=True)
class Seen:
    """What a module returned: one vector (D,) per token."""

    d_in: int
    tuple_index: int | None
    time_first: bool
    n_calls: int = 1  # in one pass


def vectors_of(value: Any, shape: tuple[int, int]) -> Seen | None:
    """Vectors in a module's output or input for a batch of (S, T) tokens; None if it has no vector per token."""
    tensor, index = tensor_of(value)
    if tensor is None or tensor.ndim not in (2, 3):
        return None
    places = tuple(tensor.shape[:-1])
    if places not in (shape, shape[::-1], (shape[0] * shape[1],), (1, shape[0] * shape[1])):
        return None
    return Seen(int(tensor.shape[-1]), index, time_first=places == shape[::-1])


def no_vectors(hook: Hook, value: Any, shape: tuple[int, int]) -> HookError:
    """Describe what a module returned instead of one vector per token."""
    tensor, _ = tensor_of(value)
    got = "no tensor" if tensor is None else f"a tensor of shape {tuple(tensor.shape)}"
    return HookError(
        f"{hook.module} ({hook.side}) gives {got} for {shape[0]} x {shape[1]} tokens: expected one vector per "
        "token; name another module with --hook"
    )


def own_multiple(base: nn.Module) -> int:
    """The multiple to which a model with windowed attention pads lengths by itself, from its config; else 1."""
    for name in ("attention_window", "block_size"):
        value = getattr(getattr(base, "config", None), name, None)
        value = max(value, default=1) if isinstance(value, list | tuple) else value
        if isinstance(value, int) and value > 1:
            return value
    return 1


def probe_shapes(base: nn.Module) -> tuple[tuple[int, int], tuple[int, int]]:
    """Two batch shapes (S, T) with lengths that the model does not pad by itself."""
    multiple = own_multiple(base)
    first = round_up(_LENGTHS[0], multiple)
    return (2, first), (3, round_up(first + _LENGTHS[1] - _LENGTHS[0], multiple))


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is not less than n."""
    return -(-n // multiple) * multiple


def probe_ids(base: nn.Module, shape: tuple[int, int], device: str) -> torch.Tensor:
    """Token ids (S, T) within the embedding, without special meaning as far as is known without the tokenizer."""
    import torch

    n = vocabulary_size(base) or 1
    return (torch.arange(shape[0] * shape[1], device=device) * 7 + n // 2).remainder(n).reshape(shape)


def vocabulary_size(base: nn.Module) -> int | None:
    """Rows of the token embedding; None if the model does not expose it."""
    try:
        embedding = base.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return getattr(embedding, "num_embeddings", None)


def probe(base: nn.Module, hooks: Sequence[Hook], device: str) -> tuple[Hook, ...]:
    """The hooks with width, tuple index and layout, from two tiny passes (on the meta device: shapes only).

    Raises HookError if a module has no vector per token, and any error of the model.
    """
    import torch

    found: dict[str, list[Seen]] = {hook.name: [] for hook in hooks}
    shapes = probe_shapes(base)
    shape = shapes[0]

    def sink(hook: Hook, value: Any) -> None:
        seen = vectors_of(value, shape)
        if seen is None or (found[hook.name] and found[hook.name][0] != seen):
            raise no_vectors(hook, value, shape)
        found[hook.name].append(seen)

    capture = Capture(base, hooks)
    try:
        with torch.inference_mode():
            for shape in shapes:
                capture.run(probe_ids(base, shape, device), None, sink)
    finally:
        capture.close()
    looks = [(hook, found[hook.name][0]) for hook in hooks]
    return tuple(replace(h, tuple_index=one.tuple_index, d_in=one.d_in, time_first=one.time_first) for h, one in looks)


def probe_all(base: nn.Module, device: str) -> dict[str, Seen]:
    """Path -> what each module gives that runs in a whole pass and gives one vector per token.

    Raises what the model raises.
    """
    import torch

    looks: list[dict[str, Seen]] = []
    shapes = probe_shapes(base)

    def watch(path: str) -> Callable[..., None]:
        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen, shape = looks[-1], shapes[len(looks) - 1]
            if path in seen:
                seen[path] = replace(seen[path], n_calls=seen[path].n_calls + 1)
            elif (one := vectors_of(output, shape)) is not None:
                seen[path] = one

        return after

    handles = [module.register_forward_hook(watch(path)) for path, module in base.named_modules() if path]
    try:
        with torch.inference_mode():
            for shape in shapes:
                looks.append({})
                base(input_ids=probe_ids(base, shape, device))
    finally:
        for handle in handles:
            handle.remove()
    return {path: one for path, one in looks[0].items() if looks[1].get(path) == one}
