"""Matryoshka: nested prefixes of the dictionary each reconstruct the input (Bussmann et al., arXiv 2503.17547).

The codes are decoded once, group by group, and each prefix is a sum of groups.
Shapes: N rows, D = d_out, F = d_sae, P groups of latents and as many prefixes, the last of which is all of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sae_granary.sae_core.autograd import decode
from sae_granary.sae_core.codes import Codes, Pattern, sort_narrow
from sae_granary.sae_core.data import Activation, SAEOutput
from sae_granary.sae_core.errors import OptionError
from sae_granary.sae_core.files import saelens
from sae_granary.sae_core.options import Progress, option
from sae_granary.sae_core.registry import register
from sae_granary.sae_core.variants.batchtopk import BatchTopKSAE

FRACTIONS = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)  # prefix ends: groups of 1, 2, 4, 8 and 17 thirty-seconds
CACHED_ENTRIES = 2**20  # of (P, N, D) at a time, 4 MiB of float32: what the caches of a processor hold


@register("matryoshka")
class MatryoshkaSAE(BatchTopKSAE):
    """One batch-top-k over all latents; the loss is the sum over the prefixes' reconstruction losses, plus AuxK."""

    @dataclass(frozen=True)
    class Config(BatchTopKSAE.Config):
        """Options of matryoshka."""

        fractions: tuple[float, ...] = option(
            FRACTIONS, help="Ends of the nested prefixes, as shares of d_sae; the last is 1."
        )
        group_sizes: tuple[int, ...] | None = option(
            None, help="Latents per group, which sum to d_sae; instead of fractions.", default_words="from fractions"
        )

        def validate(self) -> None:
            """Check that prefixes grow and that the last one is the whole dictionary."""
            super().validate()
            if self.group_sizes is not None:
                if any(size <= 0 for size in self.group_sizes) or sum(self.group_sizes) != self.d_sae:
                    total = sum(self.group_sizes)
                    raise OptionError(f"group_sizes={self.group_sizes} sum to {total}: expected d_sae={self.d_sae}")
            elif not self.fractions or self.fractions[-1] != 1.0 or any(not 0 < f <= 1 for f in self.fractions):
                raise OptionError(f"fractions={self.fractions}: expected shares in (0, 1] that end with 1")
            if any(b <= a for a, b in zip((0, *self.prefixes), self.prefixes, strict=False)):
                raise OptionError(f"fractions={self.fractions} of d_sae={self.d_sae}: the prefixes must grow")

        @property
        def prefixes(self) -> tuple[int, ...]:
            """Number of latents in each nested prefix."""
            if self.group_sizes is not None:
                return tuple(sum(self.group_sizes[: i + 1]) for i in range(len(self.group_sizes)))
            return tuple(max(1, round(fraction * self.d_sae)) for fraction in self.fractions)

    config: Config
    group_of: Tensor

    def build(self) -> None:
        """Create the parameters, and the group of each latent."""
        super().build()
        ends = torch.tensor(self.config.prefixes)
        latents = torch.arange(self.config.d_sae)
        self.register_buffer("group_of", torch.bucketize(latents, ends, right=True), persistent=False)

    def reconstruct_for_losses(self, activation: Activation, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruct with every prefix for the cost of one decode: groups are decoded once, then summed."""
        n_groups = len(self.config.prefixes)
        if not self.training or n_groups == 1:
            return super().reconstruct_for_losses(activation, target)
        groups = decode_groups(activation.codes, self.W_dec, self.group_of, n_groups)
        errors, whole = prefix_errors(groups, self.b_dec, target)
        return whole, {"prefix_errors": errors}

    def penalties(self, out: SAEOutput, progress: Progress) -> dict[str, Tensor]:
        """The losses of the proper prefixes (the whole dictionary's is the reconstruction loss), and AuxK."""
        terms = super().penalties(out, progress)
        errors = out.extras.get("prefix_errors")
        if errors is None:
            return terms
        return {"prefixes": self.loss_scale.mean_error(errors, out.source.target), **terms}


saelens.express(MatryoshkaSAE, "jumprelu")


def decode_groups(codes: Codes, W_dec: Tensor, group_of: Tensor, n_groups: int) -> Tensor:
    """Decode each group of latents on its own: (P, N, D), whose sum over groups is `decode`.

    group_of (F,) int64 gives each latent's group. Groups become rows of one larger pattern, so the price is one decode.
    """
    pattern = codes.pattern
    indices = pattern.entries[0]
    group_row = torch.add(pattern.row_of, group_of[indices], alpha=pattern.n_rows)
    order = sort_narrow(group_row, n_groups * pattern.n_rows).indices
    by_group = Pattern.of_rows(group_row[order], indices[order], n_groups * pattern.n_rows, pattern.d_sae)
    decoded = decode(Codes(_Permuted.apply(codes.values, order), by_group), W_dec)  # type: ignore[no-untyped-call]
    return decoded.view(n_groups, pattern.n_rows, -1)


class _Permuted(Function):
    """values[order], whose gradient is written by one kernel, where that of an index is sorted and added up."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, order: Tensor) -> Tensor:
        ctx.order = order
        return values[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.empty_like(grad).index_copy_(0, ctx.order, grad), None


def prefix_errors(groups: Tensor, start: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Summed squared errors (N,) of all proper prefixes, and the reconstruction (N, D) of the last prefix.

    Prefix i reconstructs start + groups[0] + ... + groups[i]; its error is the squared distance from target (N, D).
    groups (P, N, D), P at least 2, start (D,). All prefixes and their gradients are computed in one pass over blocks of
    rows.
    """
    return _PrefixErrors.apply(groups, start, target)  # type: ignore[no-any-return, no-untyped-call]


class _PrefixErrors(Function):
    @staticmethod
    def forward(ctx: Any, groups: Tensor, start: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        n_inner, n_rows, _ = groups[:-1].shape
        errors, whole = groups.new_zeros(n_rows), torch.empty_like(groups[-1])
        pulls = torch.empty_like(groups[:-1])  # at i the sum of the residuals of proper prefixes that hold group i
        for rows in _row_blocks(groups):
            total = start
            for i in range(n_inner):
                total = total + groups[i, rows]
                residual = torch.sub(total, target[rows], out=pulls[i, rows])
                errors[rows].add_(torch.linalg.vector_norm(residual, dim=-1).square_())
            torch.add(total, groups[-1, rows], out=whole[rows])
            for i in reversed(range(n_inner - 1)):
                pulls[i, rows].add_(pulls[i + 1, rows])
        ctx.save_for_backward(pulls)
        return errors, whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_errors: Tensor, grad_whole: Tensor) -> Any:
        (pulls,) = ctx.saved_tensors
        slopes = 2 * grad_errors[:, None]
        grad = pulls.new_empty(len(pulls) + 1, *grad_whole.shape)
        torch.addcmul(grad_whole, pulls, slopes, out=grad[:-1])
        grad[-1] = grad_whole
        grad_target = pulls[0] * -slopes if ctx.needs_input_grad[2] else None
        return grad, grad[0].sum(0), grad_target


def _row_blocks(groups: Tensor) -> Iterator[slice]:
    """Blocks of rows on a CPU, all rows at once on other devices, where one launch is faster."""
    n_groups, n_rows, width = groups.shape
    size = max(1, CACHED_ENTRIES // (n_groups * width)) if groups.device.type == "cpu" else max(1, n_rows)
    for start in range(0, n_rows, size):
        yield slice(start, start + size)
