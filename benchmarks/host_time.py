"""What the host does for one training step: `python -m benchmarks.host_time`.

Steps with hardly any work, on one thread of a CPU that counts as a device of its own, so that they take the path of a
GPU. Their processor time is that of Python and of torch's dispatch, and of tiny products; on a GPU a step that takes
less time than that waits for its host.
"""

import statistics
import sys
import time

import torch

from benchmarks.machine import describe
from benchmarks.table import markdown
from sae_granary.train.config.merge import make_config
from sae_granary.train.loop import train_step
from sae_granary.train.state.run_state import Run, build_sae
from sae_granary.train.step_input import RowInput

TYPES = ("topk", "batchtopk", "matryoshka", "vanilla")
D_IN, D_SAE, K, N_ROWS = 8, 512, 3, 64
WARM, TURNS, STEPS = 50, 40, 10  # steps before, measurements, steps of each


def step_times(name: str) -> list[float]:
    """Milliseconds of processor time per step, of each turn."""
    shape = {"d_in": D_IN, "d_sae": D_SAE, "dead_after_tokens": 10**9} | ({} if name == "vanilla" else {"k": K})
    given = {"type": name, "cache": "none", "device": "cpu", "compute_dtype": "float32", "lr": 1e-3, "steps": 10_000}
    config = make_config([given | shape])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N_ROWS, D_IN, generator=generator)
    sae = build_sae(config)
    sae.initialize(x, generator)
    if name == "vanilla":  # about as few active latents as the others have
        with torch.no_grad():
            sae.encoder_bias.sub_(sae.pre_acts(sae.encoder_input(x)).dense.quantile(1 - K / D_SAE))
    run, batch, times = Run.create(config, sae), RowInput({"rows": x}), []
    for turn in range(WARM // STEPS + TURNS):
        start = time.process_time()
        for _ in range(STEPS):
            train_step(run, batch)
        if turn >= WARM // STEPS:
            times.append((time.process_time() - start) / STEPS * 1e3)
    return times


def main() -> None:
    torch.set_num_threads(1)
    for module in [module for name, module in sys.modules.items() if name.startswith("sae_granary.")]:
        if hasattr(module, "host_waits"):
            module.host_waits = lambda tensor: True  # type: ignore[attr-defined]
    measured = [(name, step_times(name)) for name in TYPES]
    rows = [(name, f"{min(times):.2f}", f"{statistics.median(times):.2f}") for name, times in measured]
    print(f"{describe()}\n\n{markdown(('type', 'ms of CPU time per step, least', 'median'), rows)}")


if __name__ == "__main__":
    main()
