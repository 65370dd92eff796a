"""Screening (`screen.py`) on a GPU: exact float32 selections for the price of a product in bfloat16.

Shapes: N rows, D width, F latents, G groups of neighboring latents, S slots for candidates.

One kernel writes the product rounded to bfloat16, half the bytes of float32, and the maxima of its groups, an eighth of
that. The maxima give a bound that the wanted entries reach, and tell which groups hold candidates; only those groups
are read again. (Writing no product at all would mean to compute it twice: at d_in 768 that costs four times the
writing.) Candidates get their exact values from `sampled_dot`. Every shape is known beforehand, so the host never
waits; a flag on the device says whether everything fit. Rows are taken in parts whose product fits in CHUNK_ENTRIES.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sae_granary.sae_core.kernels import screen
from sae_granary.sae_core.kernels.choice import takes_triton
from sae_granary.sae_core.kernels.padded import ABSENT
from sae_granary.sae_core.kernels.sparse import sampled_dot

GROUP = 16  # as in triton_screen, which needs Triton to be imported
MIN_ENTRIES = 2**22  # of a (N, F) matrix: below, everything is a matter of launches
CHUNK_ENTRIES = 2**30  # of a product held at a time, 2 GiB
MAX_K = 512
PER_K = 4  # places for candidates and hot groups of a row, over k
PER_BATCH_K = 16  # the same where rows share N * k: some have many
SLOTS = 2.0  # for candidates of all rows, over N * k
BINS = 1024  # of bfloat16 numbers under the largest: a factor of 256
BLOCKS = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "TOGETHER": 8}
PRODUCT = {"num_warps": 8, "num_stages": 3}
# The largest that spill no register and leave 24 active warps on a multiprocessor: `benchmarks.kernel_resources`.
SEARCHED, COUNTED, TILE = 1024, 512, 32  # maxima that a program looks at together, to find or to count; hot groups


class Candidates(NamedTuple):
    """Entries among which are all that are wanted, by row and column; `indptr[-1]` slots are used."""

    rows: Tensor  # (S,) int64
    columns: Tensor  # (S,) int64; where no candidate is, any column
    values: Tensor  # (S,) exact; where no candidate is, ABSENT
    indptr: Tensor  # (N + 1,) int64
    fits: Tensor  # () bool: whether there was room for all, and the bound holds


def pays(h: Tensor, d_sae: int, k: int) -> bool:
    """Whether to select about k of d_sae latents of rows h (N, D) this way."""
    large = h.shape[0] * d_sae >= MIN_ENTRIES and d_sae % GROUP == 0 and d_sae >= 4 * GROUP * k
    return large and k <= MAX_K and h.dtype == torch.float32 and takes_triton(h)


class GpuScreen:
    """Rows h (N, D), latents W (F, D) and bias (F,) in bfloat16, and how far their product may lie from the exact."""

    def __init__(self, h: Tensor, W: Tensor, bias: Tensor) -> None:
        self.h, self.W, self.bias = h, W, bias
        self.n_rows, self.d_sae = len(h), len(W)
        self._rows, (row_norm, row_loss, _) = _round(h)
        self._latents, (_, latent_loss, latent_norm) = _round(W)
        # As in `screen.screen`, twice: matrix units truncate their sums, and `sampled_dot` rounds its own.
        summing = 2 * (h.shape[1] + GROUP) * screen.FLOAT32_ROUNDING
        largest_loss, largest_norm = latent_loss.max(), latent_norm.max()
        roomy = 1 + 1e-4
        row_slack = row_norm * (largest_loss + summing * largest_norm) + row_loss * largest_norm
        shares = torch.maximum(latent_loss / largest_loss, latent_norm / largest_norm)
        self._row_slack = row_slack * roomy
        self._share = shares.view(-1, GROUP).amax(1) * roomy
        self._bias_slack = (summing * bias.abs().max() + 4 * (h.shape[1] + GROUP) * screen.SMALLEST).view(1)
        self._bounded = torch.isfinite(self._row_slack.max() + self._bias_slack).all()

    def topk(self, k: int, *, by_magnitude: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Columns (N, k) ascending and exact values (N, k) of each row's k largest (in magnitude); whether they fit."""
        from sae_granary.sae_core.kernels.triton_screen import choose_largest

        room = _power_of_two(PER_K * k)
        found = self._candidates(int(SLOTS * self.n_rows * k), room, k=k, by_magnitude=by_magnitude)
        columns, values = found.columns.new_empty(self.n_rows, k), found.values.new_empty(self.n_rows, k)
        with torch.cuda.device_of(self.h):
            choose_largest[(self.n_rows,)](
                found.values, found.columns, found.indptr, columns, values, k, ABSENT,
                WIDTH=room, SLOTS=_power_of_two(k), MAGNITUDE=by_magnitude, num_warps=_warps(room),
            )  # fmt: skip
        return columns, values, found.fits & (found.indptr.diff().amax() <= room)

    def batch_topk(self, k: int) -> Candidates:
        """N * k entries: the largest positive ones of all rows, and where there are fewer, others; ties as on a CPU."""
        n_keep = self.n_rows * k
        one_part = self.n_rows <= self._chunk
        parts = [self._product(start, store=one_part) for start in range(0, self.n_rows, self._chunk)]
        bound = self._bound_of_batch(torch.cat([maxima for _, maxima in parts]), n_keep)
        room = min(_power_of_two(PER_BATCH_K * k), self.d_sae // GROUP)
        found = self._candidates(int(SLOTS * n_keep), room, bound=bound, product=parts[0] if one_part else None)
        smallest = found.values.topk(n_keep, sorted=False).values.amin()
        tied, larger = found.values == smallest, found.values > smallest
        kept = larger | (tied & (tied.cumsum(0) <= n_keep - larger.sum()))
        slots = torch.nonzero_static(kept, size=n_keep).squeeze(1)
        rows = found.rows[slots]
        ends = torch.arange(self.n_rows + 1, device=rows.device)
        indptr = torch.searchsorted(rows, ends)
        return Candidates(rows, found.columns[slots], found.values[slots], indptr, found.fits)

    def above(self, bound: Tensor | float, n_slots: int) -> Candidates:
        """The entries above a bound, or above each latent's own (F,); others have the value ABSENT."""
        shifted = GpuScreen._shifted(self, bound)
        room = min(_power_of_two(PER_BATCH_K * max(4, n_slots // self.n_rows)), self.d_sae // GROUP)
        found = shifted._candidates(n_slots, room, bound=self.bias.new_zeros(1), bias=self.bias)
        own = bound[found.columns] if isinstance(bound, Tensor) and bound.dim() else bound
        return found._replace(values=torch.where(found.values > own, found.values, ABSENT))

    def _shifted(self, bound: Tensor | float) -> "GpuScreen":
        """The same with entries p - bound, so that all of them have the bound 0."""
        other = object.__new__(GpuScreen)
        other.__dict__.update(self.__dict__)
        other.bias = self.bias - bound
        summing = 2 * (self.h.shape[1] + GROUP) * screen.FLOAT32_ROUNDING
        other._bias_slack = self._bias_slack + summing * other.bias.abs().max()
        return other

    @property
    def _chunk(self) -> int:
        """Rows whose product is held at a time."""
        return max(1, CHUNK_ENTRIES // self.d_sae // 128 * 128)

    def _product(self, start: int, *, store: bool = True, by_magnitude: bool = False) -> tuple[Tensor, Tensor]:
        """Entries (n, F), left out without `store`, and group maxima (n, G) of the rows of a part, as bfloat16."""
        from sae_granary.sae_core.kernels.triton_screen import product

        rows = self._rows[start : start + self._chunk]
        entries = rows.new_empty((len(rows), self.d_sae) if store else (1,))
        maxima = rows.new_empty(len(rows), self.d_sae // GROUP)
        n_programs = -(-len(rows) // BLOCKS["BLOCK_M"]) * -(-self.d_sae // BLOCKS["BLOCK_N"])
        with torch.cuda.device_of(rows):
            product[(n_programs,)](
                rows, self._latents, self.bias, entries, maxima, len(rows), self.d_sae, rows.shape[1],
                **BLOCKS, GROUP=GROUP, MAGNITUDE=by_magnitude, STORE=store, WIDEN=rows.device.type == "cpu",
                **PRODUCT,
            )  # fmt: skip
        return entries, maxima

    def _bound_of_batch(self, maxima: Tensor, n_keep: int) -> Tensor:
        """A bound (1,) that at least n_keep exact entries reach, or 0 if it would be negative."""
        from sae_granary.sae_core.kernels.triton_screen import histogram

        largest = maxima.amax().clamp_min(0).view(torch.int16).to(torch.int32)
        counts = torch.zeros(BINS, dtype=torch.int32, device=maxima.device)
        n_groups = maxima.shape[1]
        with torch.cuda.device_of(maxima):
            histogram[(min(self.n_rows, 1024),)](
                maxima, self._row_slack, self._share, self._bias_slack, largest, counts, self.n_rows, n_groups,
                BINS=BINS, BLOCK=min(COUNTED, _power_of_two(n_groups)), num_warps=4,
            )  # fmt: skip
        place = (counts.cumsum(0) < n_keep).sum()
        bits = torch.where(place < BINS - 1, largest - place, 0).clamp_min(0).to(torch.int32) << 16
        return bits.view(torch.float32).view(1)

    def _candidates(
        self, n_slots: int, room: int, *, k: int = 0, bound: Tensor | None = None, by_magnitude: bool = False,
        product: tuple[Tensor, Tensor] | None = None, bias: Tensor | None = None,
    ) -> Candidates:  # fmt: skip
        """Entries that may reach the bound (1,), or be among the k largest of their row, with exact values.

        `bias` is that of the values, where the product has another.
        """
        from sae_granary.sae_core.kernels.triton_screen import collect, find_hot_groups

        device, n_rows, n_groups = self.h.device, self.n_rows, self.d_sae // GROUP
        rows = torch.full((n_slots,), n_rows - 1, dtype=torch.int64, device=device)
        columns = torch.arange(n_slots, device=device) % self.d_sae  # slots that stay empty share no latent
        indptr = torch.zeros(n_rows + 1, dtype=torch.int64, device=device)
        least = self.bias.new_empty(n_rows) if bound is None else bound
        n_hot = torch.empty(n_rows, dtype=torch.int32, device=device)
        for start in range(0, n_rows, self._chunk):
            entries, maxima = product or self._product(start, by_magnitude=by_magnitude)
            n, slack = len(maxima), (self._row_slack[start:], self._share, self._bias_slack)
            groups = torch.empty(n, room, dtype=torch.int32, device=device)
            own, hot = least[start:] if bound is None else least, n_hot[start:]
            counts = indptr.new_empty(n)
            options = {"TILE": TILE, "GROUP": GROUP, "SAME": bound is not None, "num_warps": 4}
            with torch.cuda.device_of(self.h):
                find_hot_groups[(n,)](
                    maxima, *slack, own, groups, hot, n_groups, k, room,
                    BLOCK=min(SEARCHED, _power_of_two(n_groups)), SEARCH=bound is None, num_warps=4,
                )  # fmt: skip
                given = (entries, groups, hot, own, *slack)
                places = (rows, columns, counts, start, self.d_sae, room, n_slots)
                collect[(n,)](*given, indptr, *places, WRITE=False, **options)
                torch.add(counts.cumsum(0), indptr[start], out=indptr[start + 1 : start + n + 1])
                collect[(n,)](*given, indptr[start:], *places, WRITE=True, **options)
        fits = (indptr[-1] <= n_slots) & (n_hot.amax() <= room) & self._bounded
        indptr.clamp_(max=n_slots)
        values = sampled_dot(self.h.contiguous(), self.W, indptr, columns)
        values.add_((self.bias if bias is None else bias)[columns])
        absent = torch.arange(n_slots, device=device) >= indptr[-1]
        return Candidates(rows, columns, values.masked_fill_(absent, ABSENT), indptr, fits)


def _round(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (M, D) in bfloat16, and three norms (3, M) of each row: of it, of what is lost, of what is kept."""
    from sae_granary.sae_core.kernels.triton_screen import round_rows

    n_rows, width = matrix.shape
    rounded = torch.empty(n_rows, width, dtype=torch.bfloat16, device=matrix.device)
    norms = matrix.new_empty(3, n_rows)
    with torch.cuda.device_of(matrix):
        round_rows[(n_rows,)](
            matrix, rounded, norms, n_rows, width, *matrix.stride(), BLOCK=min(1024, _power_of_two(width)), num_warps=4
        )
    return rounded, norms.add_(screen.lost_in_norms(matrix))


def _power_of_two(number: int) -> int:
    return 1 << max(4, (number - 1).bit_length())


def _warps(width: int) -> int:
    return max(1, min(8, width // 128))
