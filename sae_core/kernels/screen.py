"""Screening: a fast product in bfloat16 leaves few candidates, so that the exact product is taken at those alone.

Shapes: N rows, D width, F latents. Exact is p = h @ W.T + b in float32; v is what the bfloat16 product sums up, a is v
rounded to bfloat16. With rounded factors h', W' the Cauchy-Schwarz inequality bounds |p - v| for every latent j by
|h| |W_j - W'_j| + |h - h'| |W'_j|, plus what summing in float32 loses and what is too small for float32. The slack s
takes the largest of these over the latents of a group (`select.py`): a few latents with large weights do not loosen the
bound of all others. Rounding is monotone, so p >= T implies a >= bfloat16(T - s): no entry that matters is ever missed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sae_granary.sae_core.kernels.select import GROUP, at_least, group_maxima

MIN_ENTRIES = 3 * 2**21  # of a (N, F) matrix: below, one product and one pass cost less than the bookkeeping
MAX_CANDIDATES = 0.02  # share of (N, F) above which the exact product at the candidates costs more than the whole
CHUNK_ENTRIES = 2**23  # of a product in bfloat16, 16 MiB, held at a time
BIAS_TERMS = 3  # a float32 is the sum of three bfloat16
ROWS_SAMPLED, LATENTS_SAMPLED = 64, 2048  # of which the entries tell roughly how large the others are
ROW_TILE = 32  # rows that matrix units take at a time
PAD = 32  # columns that carry the bias: matrix units work on tiles of 32
BFLOAT16_ROUNDING, FLOAT32_ROUNDING = 2.0**-8, 2.0**-23
SMALLEST = 2.0**-126  # in magnitude: the processor may take smaller numbers as 0


@dataclass(frozen=True, eq=False)
class Screen:
    """Factors in bfloat16, the bias as further columns, and how far their product may lie from the exact one."""

    rows: Tensor  # (N, D + PAD) bfloat16
    latents: Tensor  # (F, D + PAD) bfloat16
    row_slack: Tensor  # (N,) of the latent whose slack is the largest
    group_share: Tensor  # (G,) in [0, 1], of that slack
    bias_slack: Tensor  # () further slack of every entry

    def is_bounded(self) -> bool:
        """Whether the slack is finite: not for factors with NaN, or whose squares overflow float32."""
        return bool(torch.isfinite(self.row_slack.max() + self.bias_slack))

    def slack(self, start: int, stop: int) -> Tensor:
        """Slack (n, G) of each group's entries, for some rows."""
        return torch.addcmul(self.bias_slack, self.row_slack[start:stop, None], self.group_share)

    def sample(self) -> Tensor:
        """Approximate pre-activations of some of the rows and latents, as the function `sample` gives."""
        rows, latents = self.rows[_sampled_rows(self.rows)], self.latents[sampled_latents(len(self.latents))]
        return (rows @ latents.t()).float()

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Approximate pre-activations (n, F) of some rows at a time, slack (n, G), and the first of these rows.

        Each chunk overwrites the one before.
        """
        n_rows, d_sae = len(self.rows), len(self.latents)
        n_chunks = max(1, round(n_rows * d_sae / CHUNK_ENTRIES))
        size = -(-n_rows // (n_chunks * ROW_TILE)) * ROW_TILE
        buffer = self.rows.new_empty(min(size, n_rows), d_sae)
        for start in range(0, n_rows, size):
            rows = self.rows[start : start + size]
            entries = torch.mm(rows, self.latents.t(), out=buffer[: len(rows)])
            yield entries, self.slack(start, start + len(rows)), start


def pays(h: Tensor, d_sae: int) -> bool:
    """Whether screening rows h (N, D) is faster: only where the processor multiplies bfloat16 faster than float32."""
    large = h.shape[0] * d_sae >= MIN_ENTRIES and d_sae % 16 == 0
    return large and h.device.type == "cpu" and h.dtype == torch.float32 and _multiplies_bfloat16()


@cache
def _multiplies_bfloat16() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # older than 2.13
        return False
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)
    return bool(fast) and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def sampled_latents(d_sae: int) -> slice:
    """Indices of the latents that `sample` uses."""
    return slice(None, None, max(1, d_sae // LATENTS_SAMPLED))


def sampled(matrix: Tensor) -> Tensor:
    """The entries of (N, F) of which `sample` gives approximations."""
    return matrix[_sampled_rows(matrix), sampled_latents(matrix.shape[1])]


def sample(h: Tensor, W: Tensor, bias: Tensor) -> Tensor:
    """Approximate pre-activations of some of the rows h (N, D) and latents W (F, D), bias (F,)."""
    latents = sampled_latents(len(W))
    return (h[_sampled_rows(h)].bfloat16() @ W[latents].bfloat16().t()).float() + bias[latents]


def _sampled_rows(h: Tensor) -> slice:
    return slice(None, None, max(1, len(h) // ROWS_SAMPLED))


def screen(h: Tensor, W: Tensor, bias: Tensor) -> Screen:
    """Round rows h (N, D), latents W (F, D) and bias (F,) to bfloat16, and bound what that loses."""
    rows, row_loss, _ = _round(h)
    latents, latent_loss, latent_norm = _round(W)
    rows[:, h.shape[1] : h.shape[1] + BIAS_TERMS] = 1.0
    left = bias
    for i in range(BIAS_TERMS):
        latents[:, h.shape[1] + i] = left
        left = left - latents[:, h.shape[1] + i].float()
    # Bound of entry (n, j) without the bias: |h_n| loss_j + loss_n |W'_j| + summing |h_n| |W'_j|.
    summing = (h.shape[1] + PAD) * FLOAT32_ROUNDING
    largest_loss, largest_norm = latent_loss.max(), latent_norm.max()
    row_norm = h.norm(dim=1) + lost_in_norms(h)
    row_slack = row_norm * (largest_loss + summing * largest_norm) + row_loss * largest_norm
    shares = torch.maximum(latent_loss / largest_loss, latent_norm / largest_norm)
    bias_slack = summing * bias.abs().max() + 4 * (h.shape[1] + PAD) * SMALLEST
    roomy = 1 + 1e-4  # norms and shares are themselves rounded
    return Screen(rows, latents, row_slack * roomy, group_maxima(shares[None])[0] * roomy, bias_slack)


def _round(matrix: Tensor, block: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix (M, D) in bfloat16 with PAD columns of zeros, and for each row bounds of two norms.

    Of what is lost, and of what is kept.
    """
    n_rows, d = matrix.shape
    rounded = torch.empty(n_rows, d + PAD, dtype=torch.bfloat16, device=matrix.device)
    rounded[:, d:] = 0
    lost, kept = matrix.new_empty(n_rows), matrix.new_empty(n_rows)
    buffer = matrix.new_empty(min(block, n_rows), d)  # one for all blocks: it stays in the processor's cache
    for i in range(0, n_rows, block):
        exact, low = matrix[i : i + block], rounded[i : i + block, :d]
        back = buffer[: len(exact)].copy_(low.copy_(exact))
        torch.linalg.vector_norm(back, dim=1, out=kept[i : i + block])
        torch.linalg.vector_norm(back.sub_(exact), dim=1, out=lost[i : i + block])
    return rounded, lost.add_(lost_in_norms(matrix)), kept.add_(lost_in_norms(matrix))


def lost_in_norms(matrix: Tensor) -> float:
    """Bound on how much a row norm of (M, D) is underestimated because squares underflow to 0."""
    return math.sqrt(matrix.shape[1] * SMALLEST)


def topk_candidates(screened: Screen, k: int, *, by_magnitude: bool = False) -> Tensor | None:
    """Flat positions (C,) in (N, F), ascending by row, among which are the k largest entries of each row.

    None where they are too many for the screen to pay, or nothing bounds them.
    """
    n_rows, d_sae = len(screened.rows), len(screened.latents)
    if d_sae < GROUP * k or not screened.is_bounded():
        return None
    found = []
    for approximate, slack, start in screened.chunks():
        entries = approximate.abs_() if by_magnitude else approximate
        positions = _largest(entries, slack, k)
        if positions is None:
            return None
        found.append(positions + start * d_sae)
    positions = torch.cat(found)
    complete = torch.bincount(positions // d_sae, minlength=n_rows).min() >= k  # false where a product overflows
    return positions if bool(complete) else None


def candidates_above(screened: Screen, bound: float) -> Tensor | None:
    """Flat positions (C,) in (N, F), ascending by row, among which are all entries > bound.

    None where they are too many for the screen to pay, or nothing bounds them.
    """
    if not screened.is_bounded():
        return None
    found = []
    for entries, slack, start in screened.chunks():
        least = slack.new_full((len(slack),), bound)
        view = _as_integers(entries) if bound > float(slack.max()) else entries
        positions = _candidates(view, group_maxima(view), least, slack)
        if positions is None:
            return None
        found.append(positions + start * len(screened.latents))
    return torch.cat(found)


def _largest(entries: Tensor, slack: Tensor, k: int) -> Tensor | None:
    """Flat positions in (n, F) of the exact k largest of each row; None if there are too many candidates."""
    view = _as_integers(entries)
    maxima = group_maxima(view)
    least = _kth_at_least(maxima, slack, k)
    if not bool((least > slack.amax(1)).all()):
        view, maxima = entries, group_maxima(entries)
        least = _kth_at_least(maxima, slack, k)
    return _candidates(view, maxima, least, slack)


def _as_integers(entries: Tensor) -> Tensor:
    """The bits of bfloat16 entries, which compare like the entries where one is positive, three times faster.

    Among negative ones the order is reversed: their maximum as integers is at most their maximum.
    """
    return entries.view(torch.int16)


def _kth_at_least(maxima: Tensor, slack: Tensor, k: int) -> Tensor:
    """Lower bound (n,) of the k-th largest exact entry of each row, from groups' maxima (n, G), G >= k."""
    approximate = maxima.view(torch.bfloat16).float()
    least = torch.addcmul(approximate, approximate.abs(), approximate.new_tensor(-BFLOAT16_ROUNDING)).sub_(slack)
    # The k-th largest of any disjoint groups' maxima is at most the k-th largest entry; fewer are sorted faster.
    joined = least.shape[1] % 4 == 0 and least.shape[1] >= 16 * k
    coarse = least.view(len(least), 4, -1).amax(1) if joined else least
    return coarse.topk(k, dim=1, sorted=False).values.amin(1)


def _candidates(entries: Tensor, maxima: Tensor, least: Tensor, slack: Tensor) -> Tensor | None:
    """Flat positions in (n, F) of all entries whose exact value may be `least` (n,) or more; None if they are many.

    Entries as bfloat16, or as integers where every bound is positive.
    """
    bounds = ((least - least.abs() * FLOAT32_ROUNDING)[:, None] - slack).bfloat16().view(entries.dtype)
    return at_least(entries, maxima, bounds, int(MAX_CANDIDATES * entries.numel()))
