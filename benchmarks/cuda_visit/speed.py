"""Parts of a step and whole steps beside the roofline, products in bfloat16."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.cuda_visit import roofline
from benchmarks.cuda_visit.clock import median_ms
from benchmarks.cuda_visit.roofline import Limits, Size
from benchmarks.cuda_visit.saes import has_k, mixtures, one_hook_types, settings, start, use
from benchmarks.table import growing, say
from sae_granary.sae_core import Pattern
from sae_granary.sae_core.kernels import bag_sum, choose, row_topk, sampled_dot
from sae_granary.train.loop import autocast, train_step
from sae_granary.train.state.run_state import Run
from sae_granary.train.step_input import RowInput

SIZES = [
    Size(768, 24_576, 32, 8192),
    Size(768, 24_576, 64, 8192),
    Size(2048, 65_536, 32, 8192),
    Size(2048, 65_536, 64, 8192),
]
SLOW = {"matching_pursuit"}  # k encoder products per step by definition
FIRST = ("topk", "batchtopk", "matryoshka", "jumprelu")
NO_CHANGE = 1e-30  # a learning rate that leaves the weights as they are


def measure(size: Size, device: str, kernels: Sequence[str], show: Callable[[str], None] = say) -> None:
    """Show the tables of one size, row by row."""
    limits = roofline.measure(size, device)
    x = mixtures(size.batch, size.d_in, device)
    show(
        f"d_in {size.d_in}, d_sae {size.d_sae}, k {size.k}, batch {size.batch}, bfloat16 products; medians. Measured: "
        f"encoder product {limits.product_ms:.3f} ms, copy {limits.bytes_per_ms / 1e9:.2f} TB/s; "
        f"roofline of a step {limits.step_ms(size):.3f} ms.\n"
    )
    _steps(size, limits, x, device, kernels, show)
    show("")
    _parts(size, limits, x, device, kernels, show)


def _parts(
    size: Size, limits: Limits, x: Tensor, device: str, kernels: Sequence[str], show: Callable[[str], None]
) -> None:
    run = Run.create(
        settings("topk", device, NO_CHANGE, "bfloat16"), start("topk", size.d_in, size.d_sae, size.k, {"x": x})
    )
    train_step(run, RowInput({"x": x}))  # gradients and moments
    sae = run.sae
    with torch.no_grad():
        centered = sae.encoder_input(x)
        h = centered.values
        with autocast(x.device, "bfloat16"):
            known = sae.pre_acts(centered)
            pre_acts = known.dense
        columns = row_topk(pre_acts, size.k)
        pattern = Pattern.fixed_k(columns, size.d_sae)
        indices, indptr = pattern.entries
        order, rows, offsets = pattern.transposed
        values = pattern.take(pre_acts)
        sorted_values = values[order]
        W_dec = sae.W_dec.detach()

    def encode() -> Tensor:
        with autocast(x.device, "bfloat16"):
            return sae.pre_acts(centered).dense

    pre_bytes = 4 * size.batch * size.d_sae
    moved = size.gather_bytes
    once: dict[str, tuple[Callable[[], object], float]] = {
        "encoder product, cast, bias": (encode, limits.product_ms),
        "row_topk": (lambda: row_topk(pre_acts, size.k), limits.ms(pre_bytes)),
        "torch.topk": (lambda: pre_acts.topk(size.k, sorted=False), limits.ms(pre_bytes)),
        "batch top-k": (lambda: known.batch_topk(size.k), limits.ms(pre_bytes)),
        "entries by latent": (lambda: Pattern.fixed_k(columns, size.d_sae).transposed, 0.0),
        "projection, norm": (lambda: _project(run), limits.ms(4 * size.matrix_bytes)),
        "Adam": (run.optimizer.step, limits.ms(14 * size.matrix_bytes)),
        "unit decoder rows": (sae.after_step, limits.ms(2 * size.matrix_bytes)),
    }
    both: dict[str, tuple[Callable[[], object], float]] = {
        "projection, Adam, unit rows": (lambda: _update(run), limits.ms(14 * size.matrix_bytes)),
        "decode": (lambda: bag_sum(indices, W_dec, indptr, values), limits.ms(moved)),
        "gradient of the codes": (lambda: sampled_dot(h, W_dec, indptr, indices), limits.ms(moved)),
        "gradient of W": (
            lambda: bag_sum(rows, h, offsets, sorted_values),
            limits.ms(moved + size.matrix_bytes),
        ),
    }
    add = growing(["part, ms", *kernels, "limit"], show)
    with torch.no_grad():
        for name, (function, limit) in once.items():
            add([name, *([f"{median_ms(function, device):.3f}"] + [""] * (len(kernels) - 1)), f"{limit:.3f}"])
        for name, (function, limit) in both.items():
            add([name, *(_under(which, function, device) for which in kernels), f"{limit:.3f}"])


def _update(run: Run) -> None:
    """What follows the norm of the gradients."""
    with run.row_pass.takes_over():
        run.sae.project_gradients()
        run.row_pass.step(1.0)
        run.sae.after_step()


def _project(run: Run) -> Tensor:
    run.sae.project_gradients()
    return torch.nn.utils.get_total_norm([p.grad for p in run.sae.parameters() if p.grad is not None])


def _under(kernels: str, function: Callable[[], object], device: str) -> str:
    use(kernels, device)
    ms = median_ms(function, device)
    choose(None)
    return f"{ms:.3f}"


def _steps(
    size: Size, limits: Limits, x: Tensor, device: str, kernels: Sequence[str], show: Callable[[str], None]
) -> None:
    """Types without k at the first size only: they are not k-sparse, and their pre-activations fill the memory.

    float32 means the codes: where the encoder is screened (`kernels/screen.py`), its product is in bfloat16 there too.
    """
    names = [name for name in one_hook_types() if name not in SLOW and (has_k(name) or size == SIZES[0])]
    names.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    add = growing(["step", "dtype", "kernels", "ms", "of the roofline", "M rows/s", "peak GB", "L0"], show)
    for name in names:
        ways = [("bfloat16", which) for which in kernels] + [("float32", kernels[-1])] * has_k(name)
        for dtype, which in ways:
            use(which, device)
            ms, gigabytes, l0 = _step(name, size, x, device, dtype)
            share = f"{limits.step_ms(size) / ms:.0%}" if has_k(name) else ""
            numbers = [f"{ms:.3f}", share, f"{size.batch / ms / 1e3:.2f}", f"{gigabytes:.1f}", f"{l0:.0f}"]
            add([name, dtype, which, *numbers])
    choose(None)


def _step(name: str, size: Size, x: Tensor, device: str, dtype: str) -> tuple[float, float, float]:
    """Milliseconds of a step, peak memory in GB, and the mean number of active latents."""
    on_cuda = device != "cpu"
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    config = settings(name, device, NO_CHANGE, dtype)
    run = Run.create(config, start(name, size.d_in, size.d_sae, size.k, {"x": x}))
    ms = median_ms(lambda: train_step(run, RowInput({"x": x})), device)
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_cuda else 0.0
    with torch.no_grad():
        l0 = run.sae(x[:256]).codes.l0()
    return ms, peak, l0
