"""Pre-activations, computed exactly only where a selection needs them.

Shapes: N rows, D width of the encoder's input, F = d_sae latents, A some of the latents, nnz entries of a pattern.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sae_granary.sae_core.codes import Codes, Pattern
from sae_granary.sae_core.functional import (
    MAX_SPARSE_DENSITY,
    largest,
    sampled_bound,
    support_pattern,
    topk_entries,
    topk_pattern,
)
from sae_granary.sae_core.kernels import (
    gpu_screen,
    padded,
    row_topk,
    sampled_dot,
    screen,
    true_entries,
)
from sae_granary.sae_core.kernels.deferred import Deferred, current, host_waits, room_for

MAX_DENSE = 2**29  # entries of (N, F) that a GPU holds at a time, 2 GiB


class PreActs:
    """Pre-activations p = h @ W_enc + b of N rows, without gradients.

    Selections return codes: values of p on a pattern. Where a screen (`kernels/screen.py`) is faster, the (N, F)
    matrix is never built; the selection is the same.
    """

    def __init__(self, h: Tensor, W_enc: Tensor, bias: Tensor) -> None:
        """Centered rows h (N, D), W_enc (D, F), bias (F,)."""
        self.rows, self._W_enc, self._bias = h.detach(), W_enc.detach(), bias.detach()
        self.shape = (h.shape[0], W_enc.shape[1])
        # Each is computed when it is first needed.
        self._dense: Tensor | None = None
        self._screen: screen.Screen | None = None
        self._on_gpu: gpu_screen.GpuScreen | None = None

    @property
    def dense(self) -> Tensor:
        """All pre-activations: (N, F)."""
        if self._dense is None:
            self._dense = self._product(self.rows, self._W_enc, self._bias)
        return self._dense

    @property
    def is_dense(self) -> bool:
        """Whether all pre-activations have been computed."""
        return self._dense is not None

    @property
    def _in_parts(self) -> bool:
        """Whether the (N, F) matrix is too large for a GPU to hold beside everything else."""
        return host_waits(self.rows) and not self.is_dense and self.shape[0] * self.shape[1] > MAX_DENSE

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """All pre-activations in parts of rows (n, F), with the first row of each; one part where they all fit."""
        if not self._in_parts:
            yield 0, self.dense
            return
        size = max(1, MAX_DENSE // self.shape[1])
        for start in range(0, self.shape[0], size):
            yield start, self._product(self.rows[start : start + size], self._W_enc, self._bias)

    def at(self, pattern: Pattern) -> Codes:
        """Pre-activations of a pattern."""
        if pattern.is_full or self.is_dense:
            return Codes(pattern.take(self.dense), pattern)
        indices, indptr = pattern.entries
        values = sampled_dot(self.rows.contiguous(), self._W_enc.t().contiguous(), indptr, indices)
        return Codes(values.add_(self._bias[indices]), pattern)

    def columns(self, latents: Tensor) -> Tensor:
        """Pre-activations of some latents (A,): (N, A)."""
        if self.is_dense:
            return self.dense[:, latents]
        return self._product(self.rows, self._W_enc.t().index_select(0, latents).t(), self._bias[latents])

    def topk(self, k: int, *, by_magnitude: bool = False) -> Codes:
        """The k largest of each row, or the k of largest magnitude."""
        if (screened := self._gpu_screen(k)) is not None:
            columns, values, fits = screened.topk(k, by_magnitude=by_magnitude)
            if _accepted(fits):
                return Codes(values.view(-1), Pattern.fixed_k(columns, self.shape[1]))
        elif self._screens:
            found = screen.topk_candidates(self._screened(), k, by_magnitude=by_magnitude)
            if found is not None:
                codes = self._at_positions(found)
                chosen = topk_entries(codes.values.abs() if by_magnitude else codes.values, codes.pattern, k)
                pattern = Pattern.fixed_k(codes.indices[chosen], self.shape[1])
                return Codes(codes.values[chosen].view(-1), pattern)
        if self._in_parts:
            parts = [row_topk(part.abs_() if by_magnitude else part, k) for _, part in self.parts()]
            return self.at(Pattern.fixed_k(torch.cat(parts), self.shape[1]))
        return self.at(topk_pattern(self.dense.abs() if by_magnitude else self.dense, k))

    def batch_topk(self, k: int) -> Codes:
        """The N*k largest positive ones of the whole batch (arXiv 2412.06410).

        Exactly min(N*k, positives) stay; among equal values the lowest (row, latent) wins. On a GPU N*k stay, of which
        those that are not positive count for nothing. Instead of a selection
        over all N*F numbers, a bound guessed from a sample of rows leaves few candidates; a guess that leaves too few
        is lowered, so the answer is exact whatever the rows.
        """
        n_rows, d_sae = self.shape
        if (screened := self._gpu_screen(k)) is not None and _accepted((found := screened.batch_topk(k)).fits):
            return Codes(found.values, Pattern(n_rows, d_sae, found.columns, found.indptr, found.rows))
        if host_waits(self.rows):
            slots, values = padded.largest_slots(self.parts(), self.shape, n_rows * k)
            return Codes(values, Pattern.of_rows(slots.rows, slots.columns, n_rows, d_sae))
        sample = self._screened().sample() if self._screens else screen.sampled(self.dense)
        share = 1.25 * k / d_sae  # of the sampled entries: a quarter more than are kept
        while True:
            bound = sampled_bound(sample, share)
            codes = self.above(bound)
            if bound == 0.0 or codes.values.numel() >= n_rows * k:
                return codes.keep(largest(codes, n_rows * k))
            share *= 4

    def above(self, bound: Tensor | float) -> Codes:
        """Pre-activations above a bound, or above each latent's own bound (F,)."""
        codes = self._screened_above(bound)
        if codes is not None:
            return codes
        found = [start * self.shape[1] + true_entries(part > bound) for start, part in self.parts()]
        return self._at_positions(torch.cat(found))

    def at_least_above(self, bound: float, unit: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """For each part of the rows, their number and their pre-activations: at least those above the bound.

        With the bound 0 all. With `unit` (F,) pre-activations and bound are in units of each latent's own.
        """
        if bound > 0:
            codes = self.above(bound if unit is None else bound * unit)
            yield self.shape[0], codes.values if unit is None else codes.values / unit[codes.indices]
            return
        for _, part in self.parts():
            yield len(part), part if unit is None else part / unit

    def support(self, bound: Tensor | float) -> Codes:
        """`above`, or a full pattern where too many exceed the bound for sparse products to be faster."""
        if host_waits(self.rows) and (deferred := current()) is not None:
            return self._support_of_step(bound, deferred)
        codes = self._screened_above(bound)
        if codes is None and self._in_parts:
            return self.above(bound)
        return self.at(support_pattern(self.dense > bound)) if codes is None else codes

    def _support_of_step(self, bound: Tensor | float, deferred: Deferred) -> Codes:
        """`support` in as many slots as the step before suggests, so that the host does not wait."""
        share, n_entries = deferred.expected_share(), self.shape[0] * self.shape[1]
        if (screened := self._gpu_screen(1)) is not None:
            share = self._share_above(bound) if share is None else share
            if share <= screen.MAX_CANDIDATES:
                room = room_for(share, n_entries)
                found = screened.above(bound, room)
                deferred.note_share(found.indptr[-1], n_entries, room)
                deferred.note_fits(found.fits)
                return Codes(found.values, Pattern(*self.shape, found.columns, found.indptr, found.rows))
        if share is None:
            share = float(self._count_above(bound)) / n_entries
        if share > MAX_SPARSE_DENSITY and not self._in_parts:
            deferred.note_share(self._count_above(bound), n_entries, n_entries)
            return Codes(self.dense, Pattern(*self.shape))
        room = room_for(share, n_entries)
        above = ((start, part > bound) for start, part in self.parts())
        slots, count = padded.true_slots(above, self.shape, room)
        deferred.note_share(count, n_entries, room)
        codes = self.at(Pattern.of_rows(slots.rows, slots.columns, *self.shape))
        return Codes(codes.values.masked_fill(slots.absent, padded.ABSENT), codes.pattern)

    def _gpu_screen(self, k: int) -> gpu_screen.GpuScreen | None:
        """The rows, latents and bias for screening on a GPU; None where it would not be faster, or has failed."""
        deferred = current()
        failed = deferred is not None and deferred.exact
        if failed or self.is_dense or not gpu_screen.pays(self.rows, self.shape[1], k):
            return None
        if self._on_gpu is None:
            self._on_gpu = gpu_screen.GpuScreen(self.rows, self._W_enc.t(), self._bias)
        return self._on_gpu

    def _count_above(self, bound: Tensor | float) -> Tensor:
        return torch.stack([(part > bound).count_nonzero() for _, part in self.parts()]).sum()

    @property
    def _screens(self) -> bool:
        return not self.is_dense and screen.pays(self.rows, self.shape[1])

    def _screened(self) -> screen.Screen:
        if self._screen is None:
            self._screen = screen.screen(self.rows, self._W_enc.t(), self._bias)
        return self._screen

    def _share_above(self, bound: Tensor | float) -> float:
        """Rough share of entries above a bound, to avoid rounding for a screen that would not be faster."""
        sample = screen.sample(self.rows, self._W_enc.t(), self._bias)
        sampled = bound if isinstance(bound, float) else bound[screen.sampled_latents(self.shape[1])]
        return float((sample > sampled).float().mean())

    def _screened_above(self, bound: Tensor | float) -> Codes | None:
        if not self._screens:
            return None
        if self._screen is None and self._share_above(bound) > screen.MAX_CANDIDATES:
            return None
        if isinstance(bound, float):
            found = screen.candidates_above(self._screened(), bound)
        else:  # one bound per latent moves into the bias: p > bound where p - bound > 0
            shifted = screen.screen(self.rows, self._W_enc.t(), self._bias - bound)
            found = screen.candidates_above(shifted, 0.0)
        if found is None:
            return None
        codes = self._at_positions(found)
        return codes.keep(codes.values > (bound if isinstance(bound, float) else bound[codes.indices]))

    def _at_positions(self, positions: Tensor) -> Codes:
        """Pre-activations at flat positions (nnz,) in (N, F), rows ascending."""
        n_rows, d_sae = self.shape
        rows = positions // d_sae
        return self.at(Pattern.of_rows(rows, torch.sub(positions, rows, alpha=d_sae), n_rows, d_sae))

    @staticmethod
    def _product(h: Tensor, W_enc: Tensor, bias: Tensor) -> Tensor:
        # The product alone may run in bfloat16 (autocast); what follows expects the dtype of the rows.
        # addmm would first spread the bias over the result.
        return (h @ W_enc).to(h.dtype).add_(bias)


def _accepted(fits: Tensor) -> bool:
    """Whether a selection is right. In a training step on a GPU that is assumed, and seen when the step is over."""
    deferred = current()
    if deferred is None:
        return bool(fits)
    deferred.note_fits(fits)
    return True
