"""Read or replace the activation at one hook point of a model while it runs.

Shapes: S sequences, T tokens, D = d_in. Which tensor of a module's input or output is meant follows from the
hook point (`common.rows.HookPoint`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sae_granary.common.rows import HookPoint
from sae_granary.models.errors import SpliceError

Edit = Callable[[Tensor], Tensor]  # (S, T, D) -> (S, T, D)


@contextmanager
def patched(module: nn.Module, point: HookPoint, shape: tuple[int, int], edit: Edit) -> Iterator[None]:
    """While the block runs, `edit` gets the activation (S, T, D) of the first call and returns what takes its place.

    Raises SpliceError if the module does not run, or gives no vector of width D per token of `shape` (S, T).
    """
    ran = False

    def once(tensor: Tensor) -> Tensor:
        nonlocal ran
        if ran:  # a block that is applied several times: only the first call was harvested
            return tensor
        ran = True
        return _as_tokens(tensor, point, shape, edit)

    if point.side == "input":
        handle = module.register_forward_pre_hook(lambda _, a, kw: _edit_input(a, kw, once), with_kwargs=True)
    else:
        handle = module.register_forward_hook(lambda _, args, output: _edit_output(output, point, once))
    try:
        yield
    finally:
        handle.remove()
    if not ran:
        raise SpliceError(f"{point.module} did not run in the language model's forward pass: no SAE can be put there")


def _edit_input(args: tuple[Any, ...], kwargs: dict[str, Any], edit: Edit) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (edit(args[0]), *args[1:]), kwargs
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return args, {**kwargs, name: edit(kwargs[name])}


def _edit_output(output: Any, point: HookPoint, edit: Edit) -> Any:
    """The output with its tensor replaced: a tensor, a tuple or list, or a ModelOutput with a last_hidden_state."""
    if isinstance(output, Tensor):
        return edit(output)
    if hasattr(output, "last_hidden_state"):
        output["last_hidden_state"] = edit(output.last_hidden_state)
        return output
    place = point.tuple_index or 0
    parts = list(output)
    parts[place] = edit(parts[place])
    return type(output)(parts)


def _as_tokens(tensor: Tensor, point: HookPoint, shape: tuple[int, int], edit: Edit) -> Tensor:
    """Edit a tensor (S, T, D) or (S*T, D)."""
    n_numbers = shape[0] * shape[1] * point.d_in
    if not isinstance(tensor, Tensor) or tensor.shape[-1] != point.d_in or tensor.numel() != n_numbers:
        got = f"a tensor of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise SpliceError(
            f"{point.module} ({point.side}) gave {got} for {shape[0]} x {shape[1]} tokens: expected one vector of "
            f"{point.d_in} per token"
        )
    return edit(tensor.reshape(*shape, point.d_in)).reshape(tensor.shape)
