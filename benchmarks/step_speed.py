"""One optimizer step of every variant against one encoder product, the floor of any exact step.

Sizes: d_in 384, d_sae 12288, k 32, batch 2048, fp32. L1 and JumpReLU variants are measured at trained density: their
biases are set so that about 64 latents per row are active.
"""

from dataclasses import fields

import torch
from torch import Tensor

from benchmarks.table import markdown
from benchmarks.timing import interleaved
from sae_core import SAE, Progress, make_config, registry
from train.config.settings import TrainConfig
from train.heap import keep_freed_memory
from train.optim.optimizers import make_optimizer

D_IN, D_SAE, K, BATCH = 384, 12_288, 32, 2048
TRAINED_L0 = 64


def run(quick: bool) -> str:
    """Return the table of steps."""
    keep_freed_memory()
    d_sae = D_SAE // 4 if quick else D_SAE
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = _rows(device)
    names = [name for name in registry.names() if registry.get(name).input_kind == "one"]
    saes = {name: _sae(name, d_sae, x) for name in names if name != "matching_pursuit"}
    steps = {name: _step(sae, x) for name, sae in saes.items()}
    W_enc, b_enc = torch.randn(d_sae, D_IN, device=device).t(), torch.zeros(d_sae, device=device)
    seconds = interleaved({"product": lambda: torch.addmm(b_enc, x, W_enc), **steps}, 5 if quick else 9)
    product = seconds.pop("product")
    rows = [["encoder product (limit)", f"{product * 1e3:.0f}", "1.00", ""]]
    for name, time in sorted(seconds.items(), key=lambda item: item[1]):
        l0 = saes[name](x).codes.l0()
        rows.append([name, f"{time * 1e3:.0f}", f"{time / product:.2f}", f"{l0:.0f}"])
    title = f"Training step: d_in {D_IN}, d_sae {d_sae}, k {K}, batch {BATCH}, fp32 on {device}; no dead latents."
    return f"{title}\n\n{markdown(['', 'ms', 'encoder products', 'L0'], rows)}"


def _rows(device: str) -> Tensor:
    """Sparse mixtures: rows whose pre-activations have the heavy tail of real ones."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2048, D_IN, generator=generator)
    weights = torch.rand(BATCH, 2048, generator=generator) * (torch.rand(BATCH, 2048, generator=generator) < 0.02)
    return (weights @ directions + 0.1 * torch.randn(BATCH, D_IN, generator=generator)).to(device)


def _sae(name: str, d_sae: int, x: Tensor) -> SAE:
    cls = registry.get(name)
    known = {spec.name for spec in fields(cls.Config)}
    options = {"d_in": D_IN, "d_sae": d_sae} | ({"k": K} if "k" in known else {})
    sae = cls(make_config(cls, options)).to(x.device)
    sae.initialize(x, torch.Generator(device=x.device).manual_seed(0))
    if "k" not in known:
        _set_density(sae, x)
    return sae.train()


@torch.no_grad()
def _set_density(sae: SAE, x: Tensor) -> None:
    pre_acts = sae.pre_acts(sae.centre(sae.prepare(x).input))
    sae.encoder_bias.sub_(pre_acts.flatten()[::97].quantile(1 - TRAINED_L0 / sae.config.d_sae))


def _step(sae: SAE, x: Tensor):  # type: ignore[no-untyped-def]
    optimizer = make_optimizer(sae.parameters(), TrainConfig(lr=1e-30))

    def step() -> None:
        losses = sae.losses(sae(x), Progress(500, 1000))
        torch.stack(list(losses.values())).sum().backward()
        sae.project_gradients()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        sae.after_step()
        optimizer.zero_grad(set_to_none=True)

    return step
