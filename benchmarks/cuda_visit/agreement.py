"""Training steps of every type: a device against the CPU, and against itself."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.cuda_visit.saes import rows_for, settings, start, use
from benchmarks.table import growing, say
from sae_granary.sae_core import SAE, Rows, registry
from sae_granary.sae_core.kernels import choose
from sae_granary.train.loop import train_step
from sae_granary.train.state.run_state import Run
from sae_granary.train.step_input import RowInput

# float32, sums in another order. Adam's first step is lr * sign(g): the second loss is compared more loosely.
BOUND, SECOND_BOUND = 1e-4, 1e-3
# An entry within rounding of the last one kept may be chosen on one side only; each changes the numbers a little.
BOUND_IF_CODES_DIFFER = 1e-2
D_IN, D_SAE, K, BATCH, N_STEPS = 64, 1024, 8, 512, 3


def check(
    device: str, kernels: Sequence[str], names: Sequence[str] | None = None, show: Callable[[str], None] = say
) -> bool:
    """Whether all agree; the table is shown row by row."""
    show(
        f"Training steps on {device} and on the CPU, float32, d_in {D_IN}, d_sae {D_SAE}, batch {BATCH}: largest "
        f"relative difference of losses and of gradients (norm of the difference over the norm; bound {BOUND:.0e}, "
        f"{BOUND_IF_CODES_DIFFER:.0e} where codes differ), of the second step's losses (bound {SECOND_BOUND:.0e}); "
        f"parameters and buffers bitwise equal when {N_STEPS} steps are repeated.\n"
    )
    header = ["type", "kernels", "codes that differ", "loss", "gradient", "second loss", "equal", "passed"]
    add, passed = growing(header, show), True
    for name in names or registry.names():
        x = rows_for(name, BATCH, D_IN, "cpu")
        sae = start(name, D_IN, D_SAE, K, x)
        for which in kernels:
            use(which, device)
            row, fine = _compare(name, which, sae, x, device)
            add(row)
            passed &= fine
    choose(None)
    return passed


def _compare(name: str, kernels: str, sae: SAE, x: Rows, device: str) -> tuple[list[str], bool]:
    here, there, again = (_run(sae, name, where) for where in ("cpu", device, device))
    x_there = {hook: part.to(device) for hook, part in x.items()}
    with torch.no_grad():
        active = [(run.sae(rows).codes.dense() != 0).cpu() for run, rows in ((here, x), (there, x_there))]
    n_differ = int((active[0] != active[1]).sum())
    pairs = ((here, RowInput(x)), (there, RowInput(x_there)))
    first = [train_step(run, batch, measure=True).losses for run, batch in pairs]
    loss = _relative(torch.tensor(list(first[1].values())), torch.tensor(list(first[0].values())))
    gradient = _gradient_difference(here, there)
    second = [train_step(run, batch, measure=True).losses for run, batch in pairs]
    second_loss = _relative(torch.tensor(list(second[1].values())), torch.tensor(list(second[0].values())))
    for _ in range(N_STEPS - 2):
        train_step(there, RowInput(x_there))
    for _ in range(N_STEPS):
        train_step(again, RowInput(x_there))
    equal = _states_equal(there.sae, again.sae)
    bound = BOUND_IF_CODES_DIFFER if n_differ else BOUND
    fine = loss <= bound and gradient <= bound and second_loss <= max(bound, SECOND_BOUND) and equal
    numbers = [f"{loss:.1e}", f"{gradient:.1e}", f"{second_loss:.1e}"]
    verdicts = ["yes" if verdict else "NO" for verdict in (equal, fine)]
    return [name, kernels, str(n_differ), *numbers, *verdicts], fine


def _run(sae: SAE, name: str, device: str) -> Run:
    return Run.create(settings(name, device, lr=1e-3), copy.deepcopy(sae))


def _gradient_difference(here: Run, there: Run) -> float:
    """The largest over parameters; one whose gradients cancel is held against a thousandth of all gradients.

    Compared are the first moments after one step: gradients as the optimizer takes them, projected and clipped.
    """
    pairs = [
        (here.optimizer.state[p]["exp_avg"], there.optimizer.state[q]["exp_avg"])
        for p, q in zip(here.sae.parameters(), there.sae.parameters(), strict=True)
        if p.grad is not None
    ]
    least = 1e-3 * float(torch.nn.utils.get_total_norm([mine for mine, _ in pairs]))
    return max(float((theirs.cpu() - mine).norm()) / max(float(mine.norm()), least) for mine, theirs in pairs)


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def _states_equal(one: SAE, other: SAE) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True) for a, b in pairs)  # NaN: not calibrated
