"""Block sizes and warps of the kernels, timed: those that the code has, which were chosen without a GPU, and others."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cuda_visit.clock import median_ms
from benchmarks.cuda_visit.roofline import Size
from benchmarks.cuda_visit.saes import mixtures
from benchmarks.table import growing, say
from sae_granary.sae_core import Pattern
from sae_granary.sae_core.kernels import gpu_screen, row_topk, triton_bag, triton_dot, triton_rows
from sae_granary.sae_core.kernels.gpu_screen import GpuScreen


class Trial(NamedTuple):
    """A kernel, and what its module may be set to."""

    kernel: str
    module: ModuleType
    settings: list[dict[str, Any]]  # by name in the module
    run: Callable[[], Tensor]


def measure(size: Size, device: str, show: Callable[[str], None] = say) -> None:
    """Show a row for each setting: its time, and whether its result has the bits of the present setting."""
    show(f"Block sizes at d_in {size.d_in}, d_sae {size.d_sae}, k {size.k}, batch {size.batch}.\n")
    add = growing(["kernel", "setting", "ms", "same bits"], show)
    for trial in trials(size, device):
        expected = trial.run()
        add([trial.kernel, "as it is", f"{median_ms(trial.run, device):.3f}", ""])
        for setting in trial.settings:
            try:
                with _set(trial.module, setting):
                    same = torch.equal(trial.run(), expected)
                    add([trial.kernel, _named(setting), f"{median_ms(trial.run, device):.3f}", "yes" if same else "no"])
            except Exception as error:  # too much shared memory, too many registers, ...
                add([trial.kernel, _named(setting), f"{type(error).__name__}: {error}"[:60], ""])


@torch.no_grad()
def trials(size: Size, device: str) -> Iterator[Trial]:
    """The kernels that a step spends its time in, those that move most bytes first."""
    x = mixtures(size.batch, size.d_in, device)
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(size.d_sae, size.d_in, generator=generator).to(device)
    W /= W.norm(dim=1, keepdim=True)
    bias = torch.zeros(size.d_sae, device=device)
    pattern = Pattern.fixed_k(row_topk(x @ W.t(), size.k), size.d_sae)
    indices, indptr = pattern.entries
    order, rows, offsets = pattern.transposed
    values = torch.randn(indices.numel(), generator=generator).to(device)
    bags = [
        {"TILE": tile, "OPTIONS": {**triton_bag.OPTIONS, "num_warps": n_warps}}
        for tile, n_warps in ((4, 2), (8, 4), (16, 4), (16, 2))
    ]
    bags.append({"OPTIONS": {"num_warps": 2, "maxnreg": None}})  # more programs, which wait for fewer rows each
    screen = GpuScreen(x, W, bias)
    blocks = [
        (128, 256, 64, 8, 4),
        (128, 128, 64, 8, 4),
        (128, 128, 64, 4, 4),
        (256, 128, 64, 8, 3),
        (128, 256, 32, 8, 4),
    ]
    products = [_product(*given) for given in blocks]
    yield Trial("product", gpu_screen, products, lambda: screen._product(screen._factors, 0).maxima)
    yield Trial(
        "gradient with its norm", triton_bag, bags,
        lambda: triton_bag.bag_sum_and_square(rows, x, offsets, values[order], W)[0],
    )  # fmt: skip
    yield Trial("decode", triton_bag, bags, lambda: triton_bag.bag_sum(indices, W, indptr, values))
    dots = [
        {"ENTRIES": entries, "OPTIONS": {**triton_dot.OPTIONS, "num_warps": n_warps}}
        for entries, n_warps in ((4, 4), (16, 4), (4, 2), (8, 2))
    ]
    yield Trial("dots at entries", triton_dot, dots, lambda: triton_dot.sampled_dot(x, W, indptr, indices))
    grad, mean, square = torch.randn(W.shape, generator=generator).to(device), torch.zeros_like(W), torch.ones_like(W)
    still = triton_rows.AdamStep(1.0, 0.0, 1.0, 1e-8, 1.0, 1.0, 0.0, decoupled=False)  # changes nothing

    def update() -> Tensor:
        triton_rows.adam_step(W, grad, mean, square, still, unit=False)
        return W

    yield Trial("Adam of a matrix", triton_rows, [{"PER_WARP": n} for n in (128, 512)], update)
    found = [{"SEARCHED": searched, "TILE": tile} for searched, tile in ((2048, 64), (512, 16), (1024, 16))]
    yield Trial("selection with its product", gpu_screen, found, lambda: screen.topk(size.k)[1])


def _product(m: int, n: int, k: int, n_warps: int, n_stages: int) -> dict[str, Any]:
    blocks = {**gpu_screen.BLOCKS, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    return {"BLOCKS": blocks, "PRODUCT": {"num_warps": n_warps, "num_stages": n_stages}}


def _named(setting: Mapping[str, Any]) -> str:
    pairs = {
        k: v
        for name, value in setting.items()
        for k, v in (value if isinstance(value, dict) else {name: value}).items()
    }
    return ", ".join(f"{name} {value}" for name, value in pairs.items())


@contextmanager
def _set(module: ModuleType, setting: Mapping[str, Any]) -> Iterator[None]:
    before = {name: getattr(module, name) for name in setting}
    try:
        for name, value in setting.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
