"""Passes of a few contexts through an unchanged model, for `models.behavior.checks`.

Shapes: S sequences, T tokens, D = d_in, N rows of all hook points of a context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sae_granary.models.behavior.state import State
from sae_granary.models.device.placement import input_device
from sae_granary.models.hooks import Capture, Hook, no_vectors, round_up, tensor_of, vectors_of

if TYPE_CHECKING:
    import torch
    from torch import nn

Ids = Sequence[int]


class Rows:
    """Batches of contexts -> for each context the rows of all hook points, concatenated; the model stays unchanged."""

    def __init__(self, base: nn.Module, hooks: Sequence[Hook], pad_id: int, state: State) -> None:
        self._base, self._pad_id, self._device = base, pad_id, input_device(base)
        self.multiple = 1  # of the length of batches
        self._capture = Capture(base, hooks)
        self.close, self.restore = self._capture.close, state.restore

    def run(self, windows: Sequence[Ids], sink: Callable[[Hook, Any], None]) -> None:
        """One pass."""
        self._capture.run(*batch_of(windows, self._pad_id, self._base, self.multiple), sink)

    def check(self, window: Ids) -> None:
        """One pass. Raises HookError where a hook point gives no vector per token."""
        shape = (1, round_up(len(window), self.multiple))

        def sink(hook: Hook, value: Any) -> None:
            if vectors_of(value, shape) is None:
                raise no_vectors(hook, value, shape)

        self.run([window], sink)

    def __call__(self, windows: Sequence[Ids]) -> list[torch.Tensor]:
        """The rows (N, D) of each window."""
        import torch

        self.restore()
        shape = (len(windows), round_up(max(map(len, windows)), self.multiple))
        found: list[list[torch.Tensor]] = [[] for _ in windows]

        def sink(hook: Hook, value: Any) -> None:
            tensor, _ = tensor_of(value)
            n_real = sum(map(len, windows))
            if vectors_of(value, shape) is None and tensor is not None and tensor.shape[:-1].numel() == n_real:
                parts = list(tensor.reshape(n_real, -1).split([len(window) for window in windows]))  # without padding
            else:
                tensor = tensor.transpose(0, 1) if hook.time_first else tensor
                parts = [part[: len(w)] for part, w in zip(tensor.reshape(*shape, -1), windows, strict=True)]
            for window, part in zip(found, parts, strict=True):
                window.append(part.to(self._device, copy=True))

        self.run(windows, sink)
        width = max(part.shape[1] for part in found[0])
        return [
            torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]) for parts in found
        ]


def batch_of(
    windows: Sequence[Ids], pad_id: int, base: nn.Module, multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(ids (S, T), mask or None where nothing is padded), on the model's device."""
    import torch

    device, longest = input_device(base), round_up(max(map(len, windows)), multiple)
    ids = torch.tensor([[*window, *[pad_id] * (longest - len(window))] for window in windows], device=device)
    mask = torch.tensor([[1] * len(w) + [0] * (longest - len(w)) for w in windows], device=device)
    return ids, None if bool(mask.all()) else mask
