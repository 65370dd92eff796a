"""Which modules of a model are harvested, under which names, and how wide they are.

Layer i is the output of transformer block i, counted from 0. Module paths are relative to the base model (of an
encoder-decoder: to its encoder). Everything here works on a model on the meta device, without weights.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from sae_granary.common.errors import nearest
from sae_granary.common.rows import HookPoint
from sae_granary.models.config import WhereConfig
from sae_granary.models.errors import HookError

if TYPE_CHECKING:
    import torch
    from torch import nn

INPUT_MARK = ":in"
_LISTED = 12  # module paths named in an error message
_PROBE_SHAPE = (2, 4)  # two sequences: what does not depend on the text has one


@dataclass(frozen=True)
class Hook:
    """One place in a model; `d_in` is 0 and `tuple_index` None until the model was probed."""

    name: str
    module: str
    side: Literal["output", "input"] = "output"
    tuple_index: int | None = None
    d_in: int = 0

    def point(self) -> HookPoint:
        """The cache's record of it."""
        return HookPoint(self.name, self.module, self.side, self.tuple_index, self.d_in)


@dataclass(frozen=True)
class Blocks:
    """The transformer blocks of a model."""

    path: str  # of the ModuleList, relative to the base model
    n: int
    shared: bool = False  # fewer modules than layers: each is applied several times


def find_blocks(base: nn.Module, n_layers: int | None) -> Blocks:
    """The ModuleList of the transformer blocks: as long as the config says, else the longest outermost one."""
    from torch import nn

    lists = [(path, module) for path, module in base.named_modules() if isinstance(module, nn.ModuleList) and path]
    outer = [(path, module) for path, module in lists if not any(path.startswith(other + ".") for other, _ in lists)]
    if not outer:
        raise HookError(f"{type(base).__name__} has no list of blocks: name modules with --hook (sae-harvest names)")
    exact = [(path, module) for path, module in outer if len(module) == n_layers]
    path, module = exact[0] if exact else max(outer, key=lambda item: len(item[1]))
    return Blocks(path, len(module), shared=not exact and n_layers is not None and len(module) < n_layers)


def choose_hooks(base: nn.Module, n_layers: int | None, where: WhereConfig) -> tuple[Hook, ...]:
    """The hooks that `--layer`, `--layer-stride` and `--hook` name, in the order of the model."""
    hooks: list[Hook] = []
    if where.layers or not where.hooks:
        blocks = find_blocks(base, n_layers)
        hooks += [Hook(f"layer_{i}", f"{blocks.path}.{i}") for i in choose_layers(blocks, where)]
    for pattern in where.hooks:
        hooks += [hook for hook in _match(base, pattern) if hook.name not in {other.name for other in hooks}]
    order = {path: i for i, (path, _) in enumerate(base.named_modules())}
    return tuple(sorted(hooks, key=lambda hook: order[hook.module]))


def choose_layers(blocks: Blocks, where: WhereConfig) -> list[int]:
    """Block numbers; out of range is refused with the number of layers."""
    if blocks.shared and where.layers != (0,):
        raise HookError(
            f"this model applies the {blocks.n} block(s) of {blocks.path} several times; only --layer 0 (the first "
            "application) can be hooked by number"
        )
    if where.layers == "all" or not where.layers:
        return list(range(0, blocks.n, where.layer_stride))
    bad = [i for i in where.layers if not 0 <= i < blocks.n]
    if bad:
        raise HookError(f"--layer {bad[0]} is out of range: the model has {blocks.n} layers, 0 to {blocks.n - 1}")
    return list(where.layers[:: where.layer_stride])


def hook_names(base: nn.Module) -> list[str]:
    """Every module path that `--hook` takes."""
    return [path for path, _ in base.named_modules() if path]


def _match(base: nn.Module, pattern: str) -> list[Hook]:
    path, mark, rest = pattern.partition(":")
    if mark and mark + rest != INPUT_MARK:
        raise HookError(f"--hook {pattern!r}: after the module path only {INPUT_MARK!r} (the module's input) is known")
    names = hook_names(base)
    found = [name for name in names if _glob(path).fullmatch(name)]
    if not found:
        if "*" in path:  # compared with paths of which each number is any number
            names = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
        hint = nearest(path, names, n=3, cutoff=0.5) or f" (it has: {', '.join(names[:_LISTED])}, ...)"
        problem = f"--hook {pattern!r} is no module of {type(base).__name__}"
        raise HookError(f"{problem}; `sae-harvest names` lists them{hint}")
    return [Hook(hook_name(name, bool(mark)), name, "input" if mark else "output") for name in found]


def _glob(pattern: str) -> re.Pattern[str]:
    """`*` stands for one part of a path or some of it, `**` for any number of parts, `?` for one character."""
    known = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    return re.compile("".join(known.get(part, re.escape(part)) for part in parts))


def hook_name(path: str, is_input: bool) -> str:
    """A module path as a folder name."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", path) + (".in" if is_input else "")
    return name if re.match(r"[A-Za-z0-9]", name) else "m" + name


class StopForward(Exception):
    """Ends a forward pass after the last hooked module."""


class Capture:
    """Runs a model up to the last hooked module and hands each hooked tensor to `sink` when it appears.

    The sink must copy: later modules may work in place on the tensor. Only a module's first call in a pass counts.
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
        """Take the hooks off the model."""
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
    """(the tensor of a module's output, its place in a tuple output); (None, None) when there is none."""
    import torch

    if isinstance(value, torch.Tensor):
        return value, None
    if isinstance(value, tuple | list) and value and isinstance(value[0], torch.Tensor):
        return value[0], 0
    first = getattr(value, "last_hidden_state", None)
    return (first, 0) if isinstance(first, torch.Tensor) else (None, None)


def probe(base: nn.Module, hooks: Sequence[Hook], device: str) -> tuple[Hook, ...]:
    """The hooks with width and tuple index, from one tiny forward pass (on the meta device: of shapes only)."""
    import torch

    found: dict[str, Hook] = {}

    def sink(hook: Hook, value: Any) -> None:
        tensor, index = tensor_of(value)
        if tensor is None or tensor.shape[:-1].numel() != _PROBE_SHAPE[0] * _PROBE_SHAPE[1]:
            shape = "no tensor" if tensor is None else f"a tensor of shape {tuple(tensor.shape)}"
            raise HookError(f"{hook.module} ({hook.side}) gives {shape}: expected one vector per token")
        found[hook.name] = replace(hook, tuple_index=index, d_in=int(tensor.shape[-1]))

    capture = Capture(base, hooks)
    try:
        with torch.inference_mode():
            capture.run(torch.zeros(_PROBE_SHAPE, dtype=torch.long, device=device), None, sink)
    finally:
        capture.close()
    return tuple(found[hook.name] for hook in hooks)


def probe_all(base: nn.Module, hooks: Sequence[Hook], device: str) -> dict[str, int]:
    """Widths of the hooks that run in a full forward pass and give one vector per token."""
    import torch

    widths: dict[str, int] = {}

    def watch(hook: Hook) -> Callable[..., None]:
        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            tensor, _index = tensor_of(output)
            if tensor is not None and tensor.ndim == 3 and tuple(tensor.shape[:2]) == _PROBE_SHAPE:
                widths.setdefault(hook.module, int(tensor.shape[-1]))

        return after

    handles = [base.get_submodule(hook.module).register_forward_hook(watch(hook)) for hook in hooks]
    try:
        with torch.inference_mode():
            base(input_ids=torch.zeros(_PROBE_SHAPE, dtype=torch.long, device=device))
    finally:
        for handle in handles:
            handle.remove()
    return widths
