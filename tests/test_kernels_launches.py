"""How many kernels a selection and a step launch on a GPU; counted in Triton's interpreter, too (`make kernels`)."""

from collections.abc import Callable, Iterator

import pytest
import torch
from step_kit import Launches, batch, count_reads, make_run
from torch.utils._python_dispatch import _disable_current_modes
from triton_kit import DEVICE

from sae_granary.sae_core.kernels import choose, gpu_screen, screen
from sae_granary.sae_core.kernels.gpu_screen import GpuScreen
from sae_granary.train.loop import train_step
from sae_granary.train.step_input import RowInput


@pytest.fixture
def of_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A number for each launch of a Triton kernel. What the interpreter does with torch is not counted."""
    from triton.runtime.interpreter import GridExecutor  # after triton_kit has chosen
    from triton.runtime.jit import JITFunction

    launched: list[int] = []
    owner, name = (GridExecutor, "__call__") if DEVICE == "cpu" else (JITFunction, "run")
    launch = getattr(owner, name)

    def counted(self, *args, **kwargs):
        launched.append(1)
        with _disable_current_modes():
            return launch(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    monkeypatch.setattr(gpu_screen, "MIN_ENTRIES", 0)
    choose("triton")
    yield launched
    choose(None)


@pytest.mark.parametrize(("select", "triton", "others"), [
    (lambda screened: screened.topk(2), 6, 1),
    (lambda screened: screened.batch_topk(2), 8, 6),
    (lambda screened: screened.above(0.0, 64), 7, 3),
    (lambda screened: screened.above(screened.bias, 64), 7, 3),
])  # fmt: skip
def test_a_selection(select: Callable[[GpuScreen], object], triton: int, others: int, of_triton: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    h, W, bias = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((2, 16), (128, 16), (128,)))
    with Launches() as of_torch:
        select(GpuScreen(h, W, bias))
    assert (len(of_triton), of_torch.n) == (triton, others)


@pytest.mark.parametrize(("name", "triton", "others"), [
    ("topk", 13, 54), ("batchtopk", 15, 73), ("vanilla", 21, 73),
])  # fmt: skip
def test_a_step(name: str, triton: int, others: int, of_triton: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    count_reads(monkeypatch)
    monkeypatch.setattr(screen, "MAX_CANDIDATES", 1.0)
    known_k = {} if name == "vanilla" else {"k": 1}
    run = make_run(name, dead_after_tokens=10**9, d_sae=64, device=DEVICE, **known_k)
    for step in range(2):
        of_triton.clear()
        rows = batch(name, step, n_rows=4).rows
        with Launches() as of_torch:
            assert train_step(run, RowInput({hook: x.to(DEVICE) for hook, x in rows.items()})).accepted
    assert len(of_triton) <= triton
    assert of_torch.n <= others
