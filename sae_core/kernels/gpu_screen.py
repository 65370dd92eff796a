"""Screening (`screen.py`) on a GPU: exact float32 selections for the price of a product in bfloat16.

Shapes: N rows, D width, F latents, G groups of neighboring latents, S slots.

One kernel writes the product rounded to bfloat16, half the bytes of float32, and the maxima of its groups, an eighth of
that. The maxima give a bound that the wanted entries reach, and tell which groups hold candidates; only those groups
are read again. (Writing no product at all would mean to compute it twice: at d_in 768 that costs four times the
writing.) Candidates get their exact values. Every shape is known beforehand, so the host never waits; a flag on the
device says whether everything fit. Whatever the host need not know is computed inside the few kernels: at this size a
step takes as long as a hundred launches. Rows are taken in parts whose product fits in CHUNK_ENTRIES.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sae_granary.sae_core.kernels import screen
from sae_granary.sae_core.kernels.choice import takes_triton
from sae_granary.sae_core.kernels.padded import ABSENT

GROUP = 16  # as in triton_screen, which needs Triton to be imported
MIN_ENTRIES = 2**22  # of a (N, F) matrix: below, everything is a matter of launches
CHUNK_ENTRIES = 2**30  # of a product held at a time, 2 GiB
MAX_K = 512
PER_K = 4  # places for candidates and hot groups of a row, over k
PER_BATCH_K = 16  # the same where rows share N * k: some have many
SLOTS = 2.0  # for candidates of all rows, over how many are kept
BINS = 1024  # of bfloat16 numbers under the largest: a factor of 256
BLOCKS = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "TOGETHER": 8}
PRODUCT = {"num_warps": 8, "num_stages": 3}
# The largest that spill no register and leave 24 active warps on a multiprocessor: `benchmarks.kernel_resources`.
SEARCHED, COUNTED, TILE = 1024, 512, 32  # maxima that a program looks at together, to find or to count; hot groups
ROUNDED, KEPT = 128, 128  # columns of a group of latents, and candidates of a row


class Factors(NamedTuple):
    """What a product takes, in bfloat16, and the bound of its error: see `triton_screen`."""

    rows: Tensor  # (N, D)
    latents: Tensor  # (F, D)
    bias: Tensor  # (F,) float32
    row_slack: Tensor  # (N,)
    share: Tensor  # (G,)
    numbers: Tensor  # (N_NUMBERS,) int32

    @property
    def fits(self) -> Tensor:
        """() int32: 0 once a selection had no room for all, or if nothing bounds the slack."""
        return self.numbers[-1]


class Part(NamedTuple):
    """The product of some rows, as bfloat16."""

    start: int  # first row
    entries: Tensor  # (n, F), or (1,) where they were not stored
    maxima: Tensor  # (n, G) of groups


class Candidates(NamedTuple):
    """Entries of rows that may be wanted, with exact values."""

    values: Tensor  # (S,)
    columns: Tensor  # (S,) int32
    spans: Tensor  # (N, 2) int64: where those of a row begin and end


class Selected(NamedTuple):
    """What is wanted, row by row; `indptr[-1]` slots are used."""

    rows: Tensor  # (S,) int64; of empty slots the last
    columns: Tensor  # (S,) int64; of empty slots any
    values: Tensor  # (S,) exact; of empty slots ABSENT
    indptr: Tensor  # (N + 1,) int64
    fits: Tensor  # () int32: 0 if there was no room for all, or if nothing bounds the slack


def pays(h: Tensor, d_sae: int, k: int) -> bool:
    """Whether to select about k of d_sae latents of rows h (N, D) this way."""
    large = h.shape[0] * d_sae >= MIN_ENTRIES and d_sae % GROUP == 0 and d_sae >= 4 * GROUP * k
    return large and k <= MAX_K and h.dtype == torch.float32 and takes_triton(h)


class GpuScreen:
    """Rows h (N, D), latents W (F, D) and bias (F,), of whose product selections compute exactly what they need."""

    def __init__(self, h: Tensor, W: Tensor, bias: Tensor) -> None:
        self.h, self.W, self.bias = h, W, bias
        self.n_rows, self.d_sae = len(h), len(W)

    def topk(self, k: int, *, by_magnitude: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Columns (N, k) ascending and exact values (N, k) of each row's k largest (in magnitude); whether they fit."""
        from sae_granary.sae_core.kernels.triton_select import choose_largest

        room, factors = _power_of_two(PER_K * k), self._factors
        columns, values = self.h.new_empty(self.n_rows, k, dtype=torch.int64), self.h.new_empty(self.n_rows, k)
        with torch.cuda.device_of(self.h):
            parts = (self._product(factors, start, by_magnitude=by_magnitude) for start in self._starts)
            found = self._candidates(factors, parts, factors.numbers, self.n_rows * room, k, room, SEARCH=True, BINS=0)
            choose_largest[(self.n_rows,)](
                *found, columns, values, k, ABSENT,
                WIDTH=room, SLOTS=_power_of_two(k), MAGNITUDE=by_magnitude, num_warps=_warps(room),
            )  # fmt: skip
        return columns, values, factors.fits

    def batch_topk(self, k: int) -> Selected:
        """N * k entries: the largest positive ones of all rows, and where there are fewer, others; ties as on a CPU."""
        factors, n_keep, one_part = self._factors, self.n_rows * k, len(self._starts) == 1
        counts = torch.zeros(1 + BINS, dtype=torch.int64, device=self.h.device)
        room = min(_power_of_two(PER_BATCH_K * k), self.d_sae // GROUP)
        with torch.cuda.device_of(self.h):
            parts: Iterable[Part] = [
                self._product(factors, start, store=one_part, find_top=True) for start in self._starts
            ]
            for part in parts:
                self._count(factors, part, counts)
            if not one_part:  # each is computed again: the bound depends on all
                parts = (self._product(factors, start) for start in self._starts)
            n_slots = int(SLOTS * n_keep)
            found = self._candidates(factors, parts, counts, n_slots, n_keep, room, SEARCH=False, BINS=BINS)
            return self._keep(factors, found, found.values.topk(n_keep, sorted=False).values.amin(), n_keep)

    def above(self, bound: Tensor | float, n_slots: int) -> Selected:
        """At most n_slots entries above a bound, or above each latent's own (F,)."""
        factors = self._factors if isinstance(bound, float) and bound == 0.0 else self._round(bound)
        counts = torch.zeros(1, dtype=torch.int64, device=self.h.device)
        n_candidates = int(SLOTS * n_slots)
        room = min(_power_of_two(PER_BATCH_K * max(4, n_candidates // self.n_rows)), self.d_sae // GROUP)
        with torch.cuda.device_of(self.h):
            parts = (self._product(factors, start) for start in self._starts)
            found = self._candidates(factors, parts, counts, n_candidates, 0, room, SEARCH=False, BINS=0)
            return self._keep(factors, found, bound, n_slots)

    @property
    def _chunk(self) -> int:
        """Rows whose product is held at a time."""
        return max(1, CHUNK_ENTRIES // self.d_sae // 128 * 128)

    @property
    def _starts(self) -> range:
        return range(0, self.n_rows, self._chunk)

    @cached_property
    def _factors(self) -> Factors:
        return self._round()

    def _round(self, bound: Tensor | float | None = None) -> Factors:
        """Factors of h @ W.T + bias, less a bound if one is given, which makes the bound of all entries 0."""
        from sae_granary.sae_core.kernels.triton_screen import N_NUMBERS, round_latents, round_rows

        h, W, d_in, n_groups = self.h, self.W, self.h.shape[1], self.d_sae // GROUP
        numbers = torch.ones(N_NUMBERS, dtype=torch.int32, device=h.device)
        rows, latents = (torch.empty(m.shape, dtype=torch.bfloat16, device=h.device) for m in (h, W))
        row_slack, losses, norms, share = (h.new_empty(n) for n in (self.n_rows, n_groups, n_groups, n_groups))
        bias = self.bias if bound is None else torch.empty_like(self.bias)
        own = bound if isinstance(bound, Tensor) else bias if bound is None else torch.full_like(bias, bound)
        underflow = screen.lost_in_norms(h)
        # As in `screen.screen`, twice: matrix units truncate their sums, and exact values are rounded, too.
        summing, tiny = 2 * (d_in + GROUP) * screen.FLOAT32_ROUNDING, 4 * (d_in + GROUP) * screen.SMALLEST
        width = _power_of_two(d_in)
        with torch.cuda.device_of(h):
            round_latents[(n_groups,)](
                W, self.bias, own, latents, bias, losses, norms, numbers, d_in, *W.stride(), underflow,
                GROUP=GROUP, BLOCK=min(ROUNDED, width), SHIFT=bound is not None, num_warps=4,
            )  # fmt: skip
            round_rows[(self.n_rows,)](
                h, rows, row_slack, losses, norms, share, numbers, n_groups, d_in, *h.stride(),
                underflow, summing, tiny, BLOCK=min(1024, width), num_warps=4,
            )  # fmt: skip
        return Factors(rows, latents, bias, row_slack, share, numbers)

    def _product(
        self, factors: Factors, start: int, *, store: bool = True, by_magnitude: bool = False, find_top: bool = False
    ) -> Part:
        from sae_granary.sae_core.kernels.triton_screen import product

        rows = factors.rows[start : start + self._chunk]
        entries = rows.new_empty((len(rows), self.d_sae) if store else (1,))
        maxima = rows.new_empty(len(rows), self.d_sae // GROUP)
        n_programs = -(-len(rows) // BLOCKS["BLOCK_M"]) * -(-self.d_sae // BLOCKS["BLOCK_N"])
        product[(n_programs,)](
            rows, factors.latents, factors.bias, entries, maxima, factors.numbers, len(rows), self.d_sae, rows.shape[1],
            **BLOCKS, GROUP=GROUP, MAGNITUDE=by_magnitude, STORE=store, FIND_TOP=find_top,
            WIDEN=rows.device.type == "cpu", **PRODUCT,
        )  # fmt: skip
        return Part(start, entries, maxima)

    def _count(self, factors: Factors, part: Part, counts: Tensor) -> None:
        """Add to the counts of groups by their lower bound."""
        from sae_granary.sae_core.kernels.triton_screen import histogram

        n, n_groups = part.maxima.shape
        histogram[(min(n, 1024),)](
            part.maxima, factors.row_slack, factors.share, factors.numbers, counts, part.start, n, n_groups,
            BINS=BINS, BLOCK=min(COUNTED, _power_of_two(n_groups)), num_warps=4,
        )  # fmt: skip

    def _candidates(
        self, factors: Factors, parts: Iterable[Part], counts: Tensor, n_slots: int, k: int, room: int,
        *, SEARCH: bool, BINS: int,
    ) -> Candidates:  # fmt: skip
        """What `triton_select.find` finds, with exact values; other slots have no value, with BINS the value ABSENT."""
        from sae_granary.sae_core.kernels.triton_dot import dots_in_spans
        from sae_granary.sae_core.kernels.triton_select import find

        columns = torch.empty(n_slots, dtype=torch.int32, device=self.h.device)
        spans = columns.new_empty(self.n_rows, 2, dtype=torch.int64)
        for start, entries, maxima in parts:
            n, n_groups = maxima.shape
            find[(n,)](
                maxima, entries, factors.row_slack, factors.share, factors.numbers, counts,
                columns.new_empty(n, room), columns, spans, start, n_groups, k, room, n_slots,
                BLOCK=min(SEARCHED, _power_of_two(n_groups)), TILE=TILE, GROUP=GROUP, BINS=BINS, SEARCH=SEARCH,
                num_warps=4,
            )  # fmt: skip
        values = self.h.new_full((n_slots,), ABSENT) if BINS else self.h.new_empty(n_slots)
        dots_in_spans(self.h, self.W, spans, columns, self.bias, values)
        return Candidates(values, columns, spans)

    def _keep(self, factors: Factors, found: Candidates, bound: Tensor | float, n_slots: int) -> Selected:
        """The candidates above a bound, or above each latent's own (F,); and as many that equal a bound () as fit."""
        from sae_granary.sae_core.kernels.triton_select import count_wanted, keep_wanted

        of_bound = {"TIES": False, "PER_LATENT": False}
        if isinstance(bound, Tensor):
            of_bound = {"TIES": bound.dim() == 0, "PER_LATENT": bound.dim() > 0}
        counts = found.spans.new_empty(self.n_rows + 1)
        count_wanted[(self.n_rows,)](*found, bound, counts, **of_bound, BLOCK=KEPT, num_warps=1)
        ends = counts.cumsum(0)
        rows, columns = (counts.new_empty(n_slots) for _ in range(2))
        values, indptr = self.h.new_empty(n_slots), torch.empty_like(counts)
        keep_wanted[(self.n_rows,)](
            *found, bound, ends, rows, columns, values, indptr, factors.numbers, n_slots, self.d_sae, ABSENT,
            **of_bound, BLOCK=KEPT, num_warps=1,
        )  # fmt: skip
        return Selected(rows, columns, values, indptr, factors.fits)


def _power_of_two(number: int) -> int:
    return 1 << max(4, (number - 1).bit_length())


def _warps(width: int) -> int:
    return max(1, min(8, width // 128))
