"""The sparse products and selections on a device against the CPU reference in float64, and bitwise against themselves.

Shapes: N rows, M latents, D width, nnz entries.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from benchmarks.cuda_visit.saes import use
from benchmarks.table import growing, say
from sae_granary.sae_core import Pattern
from sae_granary.sae_core.kernels import bag_sum, choose, kth_largest, reference, row_topk, sampled_dot, true_entries

N_REPEATS = 5
# Largest error over the largest number of the reference; sums of bfloat16 products are rounded to it once.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """A pattern with the width and the dtype of what it multiplies."""

    name: str
    pattern: Pattern
    width: int
    dtype: torch.dtype = torch.float32


def cases() -> list[Case]:
    """Usual sizes, and what is easy to get wrong."""
    generator = torch.Generator().manual_seed(0)
    usual = Pattern.fixed_k(torch.randint(4096, (2048, 32), generator=generator), 4096)
    lengths = torch.randint(0, 300, (512,), generator=generator)
    lengths[::3] = 0
    rows = torch.repeat_interleave(torch.arange(512), lengths)
    ragged = Pattern.of_rows(rows, torch.randint(1000, (len(rows),), generator=generator), 512, 1000)
    one_row = Pattern.of_rows(torch.full((9000,), 5), torch.randint(1000, (9000,), generator=generator), 16, 1000)
    return [
        Case("k 32", usual, 768),
        Case("k 32", usual, 768, torch.bfloat16),
        Case("ragged, empty rows", ragged, 384),
        Case("ragged, width 1", ragged, 1),
        Case("ragged, width 1000", ragged, 1000),
        Case("one latent everywhere", Pattern.fixed_k(torch.full((9000, 1), 3), 64), 256),
        Case("one latent everywhere", Pattern.fixed_k(torch.full((9000, 1), 3), 64), 256, torch.bfloat16),
        Case("one row holds all", one_row, 256),
        Case("k = d_sae", Pattern.fixed_k(torch.arange(256).expand(100, -1), 256), 128),
        Case("no entry", Pattern.fixed_k(torch.zeros(50, 0, dtype=torch.int64), 64), 128),
    ]


def check(
    device: str, kernels: Sequence[str], chosen: Iterable[Case] | None = None, show: Callable[[str], None] = say
) -> bool:
    """Whether all are right; the table is shown row by row."""
    show(
        f"Products on {device}: largest error over the largest number of the CPU reference in float64 "
        f"(bound {BOUNDS[torch.float32]:.0e}, bfloat16 {BOUNDS[torch.bfloat16]:.0e}); {N_REPEATS} repeats equal.\n"
    )
    add, passed = growing(["kernels", "case", "dtype", "product", "error", "equal"], show), True
    of_cases = (_check_case(case, device, names) for names in kernels for case in chosen or cases())
    for row in chain(chain.from_iterable(of_cases), _check_selections(device)):
        add([*row[:-2], f"{row[-2]:.1e}", "yes" if row[-1] else "NO"])
        passed &= bool(row[-1] and row[-2] <= _bound(row))
    return passed


def _bound(row: Sequence) -> float:  # type: ignore[type-arg]
    return BOUNDS[torch.bfloat16] if row[2] == "bfloat16" else BOUNDS[torch.float32]


def _check_case(case: Case, device: str, kernels: str) -> list[list]:  # type: ignore[type-arg]
    use(kernels, device)
    generator = torch.Generator().manual_seed(1)
    pattern = case.pattern
    n, m = pattern.n_rows, pattern.d_sae
    x, table = (torch.randn(size, case.width, generator=generator).to(case.dtype) for size in (n, m))
    weights = torch.randn(pattern.entries[0].numel(), generator=generator).to(case.dtype)
    indices, indptr = pattern.entries
    order, rows, offsets = pattern.transposed
    products = {
        "bags by row": (bag_sum, reference.bag_sum, (indices, table, indptr, weights)),
        "bags by latent": (bag_sum, reference.bag_sum, (rows, x, offsets, weights[order])),
        "dots": (sampled_dot, reference.sampled_dot, (x, table, indptr, indices)),
    }
    dtype = str(case.dtype).removeprefix("torch.")
    found = []
    for name, (ours, theirs, inputs) in products.items():
        expected = theirs(*(t.double() if t.is_floating_point() else t for t in inputs))
        error, equal = _compare(ours, [t.to(device) for t in inputs], expected)
        found.append([kernels, case.name, dtype, name, error, equal])
    choose(None)
    return found


def _compare(function: Callable[..., Tensor], inputs: Sequence[Tensor], expected: Tensor) -> tuple[float, bool]:
    got = function(*inputs)
    equal = all(torch.equal(got, function(*inputs)) for _ in range(N_REPEATS))
    if expected.numel() == 0:
        return 0.0 if got.shape == expected.shape else float("inf"), equal
    error = (got.cpu().double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    return float(error), equal


def _check_selections(device: str) -> list[list]:  # type: ignore[type-arg]
    """Exact or wrong: the error is 0 or infinite."""
    matrix = torch.randn(512, 8192, generator=torch.Generator().manual_seed(2))
    found = []
    for name, numbers in (("normal", matrix), ("ties", matrix.mul(4).round())):
        there = numbers.to(device)
        checks = {
            "row_topk": lambda x: x.gather(1, row_topk(x, 32)).sort(descending=True).values,
            "true_entries": lambda x: true_entries(x > 2.5),
            "kth_largest": lambda x: kth_largest(x.flatten(), 2**18),
        }
        for what, function in checks.items():
            same = torch.equal(function(there).cpu(), function(numbers))
            again = torch.equal(function(there), function(there))
            found.append(["torch", f"512 x 8192, {name}", "float32", what, 0.0 if same else float("inf"), again])
    return found
