"""Reductions over the ranks that train one SAE, each on its part of the rows of every batch.

Rank r has rows after those of rank r - 1. A process alone has `ALONE`, whose reductions return what they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Alone:
    """One process: nothing to reduce."""

    index: int = 0
    n: int = 1

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks, by element; every rank gets the same bits. `values` may be overwritten."""
        return values

    def minimum(self, values: Tensor) -> Tensor:
        """The minimum over the ranks, by element. `values` may be overwritten."""
        return values

    def gather(self, values: Tensor) -> list[Tensor]:
        """The values (n_r,) of each rank, in the order of the ranks; each may have another number of them."""
        return [values]

    def total(self, counts: Tensor, *numbers: int | Tensor) -> tuple[Tensor, Sequence[int | Tensor]]:
        """Sums over the ranks of integers (F,) and of single ones, in one reduction."""
        return counts, numbers

    def mean(self, own: Tensor, n_rows: int) -> Tensor:
        """A mean over rows, a scalar: that of the rows of all ranks, with the gradient of this rank's `own`."""
        return own

    def least(self, values: Tensor) -> Tensor:
        """Values whose smallest positive one is that of the values (n_r,) of all ranks; Inf if no rank has any."""
        return values

    def average(self, values: Tensor) -> Tensor:
        """The mean over the ranks, by element. `values` may be overwritten."""
        return values

    def all(self, flag: bool) -> bool:
        """Whether the flag is true on every rank."""
        return flag

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on some rank."""
        return not self.all(not flag)

    def texts(self, text: str) -> list[str]:
        """The text of each rank."""
        return [text]

    def broadcast(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Overwrite tensors with those of a rank."""


ALONE = Alone()


class Ranks(Alone):
    """The processes of a torch.distributed group, as `train.ranks` starts it.

    `failed` turns the error of a reduction, which does not say which rank is missing, into one that does.
    Sums are those of `all_reduce`: its order of addition follows from the number of ranks alone, and what one
    rank computes is sent to all, so that weights stay equal bit for bit on all ranks.
    """

    def __init__(self, index: int, n: int, failed: Callable[[RuntimeError], Exception] = lambda error: error) -> None:
        self.index, self.n, self._failed = index, n, failed

    def sum(self, values: Tensor) -> Tensor:
        return self._reduce(values, "SUM")

    def minimum(self, values: Tensor) -> Tensor:
        return self._reduce(values, "MIN")

    def average(self, values: Tensor) -> Tensor:
        return self.sum(values) / self.n

    def texts(self, text: str) -> list[str]:
        parts = self.gather(torch.frombuffer(bytearray(text.encode() + b" "), dtype=torch.uint8))
        return [bytes(part.tolist()).decode()[:-1] for part in parts]

    def all(self, flag: bool) -> bool:
        """See `Alone`; through the CPU, so that no device waits."""
        return bool(self.minimum(torch.tensor(int(flag))))

    def total(self, counts: Tensor, *numbers: int | Tensor) -> tuple[Tensor, Sequence[int | Tensor]]:
        parts = [torch.as_tensor(number, device=counts.device).reshape(1) for number in numbers]
        sums = self.sum(torch.cat([counts, *parts]))
        return sums[: counts.numel()], sums[counts.numel() :].unbind()

    def mean(self, own: Tensor, n_rows: int) -> Tensor:
        total, n = self.sum(torch.stack([own.detach() * n_rows, own.new_tensor(n_rows)]))
        whole: Tensor = own + (total / n - own.detach())
        return whole

    def least(self, values: Tensor) -> Tensor:
        positive = torch.where(values > 0, values, torch.inf)
        return self.minimum(torch.cat([positive, values.new_full((1,), torch.inf)]).amin(0, keepdim=True))

    def gather(self, values: Tensor) -> list[Tensor]:
        """See `Alone`: the lengths first, then the values, filled up to the longest."""
        lengths = torch.zeros(self.n, dtype=torch.int64)
        lengths[self.index] = values.numel()
        counts = self.sum(lengths).tolist()
        filled = values.new_zeros(max(counts))
        filled[: values.numel()] = values
        parts = [torch.empty_like(filled) for _ in range(self.n)]
        self._call("all_gather", parts, filled)
        return [part[:count] for part, count in zip(parts, counts, strict=True)]

    def broadcast(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        for tensor in tensors:
            with _dense(tensor) as dense:
                self._call("broadcast", dense.values, source)
            torch.autograd.graph.increment_version(tensor)  # torch does not: see `Deferred.count`

    def _reduce(self, values: Tensor, how: str) -> Tensor:
        from torch import distributed

        with _dense(values) as dense:
            self._call("all_reduce", dense.values, getattr(distributed.ReduceOp, how))
        return values

    def _call(self, name: str, *args: Any) -> None:
        from torch import distributed

        try:
            getattr(distributed, name)(*args)
        except RuntimeError as error:
            raise self._failed(error) from error


class _dense:
    """Context manager: contiguous memory of a tensor, such as the transpose of a W_enc, or a copy that is put back."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()
        turned = self._tensor.t() if tensor.ndim == 2 else self._tensor
        self._shares = self._tensor.is_contiguous() or turned.is_contiguous()
        self.values = self._tensor if self._tensor.is_contiguous() else turned.contiguous()
        self._turned = not self._tensor.is_contiguous()

    def __enter__(self) -> _dense:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None and not self._shares:
            self._tensor.copy_(self.values.t() if self._turned and self._tensor.ndim == 2 else self.values)
