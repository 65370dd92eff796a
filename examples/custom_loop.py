"""Train an SAE in your own loop, on shuffled batches of a cache: python examples/custom_loop.py [CACHE]"""

import sys

import torch

from sae_granary import batches, sae_core

CACHE = sys.argv[1] if len(sys.argv) > 1 else "cache/demo_l3"

N_STEPS = 50
sae_class = sae_core.registry.get("topk")
with batches(CACHE, batch_size=1024, part="train") as loader:  # endless, shuffled; `device="cuda"` for a GPU
    first = next(loader).x
    sae = sae_class(sae_class.Config(d_in=first.shape[1], d_sae=8 * first.shape[1], k=8))
    sae.initialize(first, torch.Generator().manual_seed(0))  # normalization, b_dec, weights
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    for step in range(N_STEPS):
        progress = sae_core.Progress(step, N_STEPS)
        sae.begin_step(progress)  # annealed options
        out = sae(next(loader).x)
        losses = sae.losses(out, progress)  # by name: fvu, auxk ...
        optimizer.zero_grad()
        sum(losses.values()).backward()
        sae.track(out)  # dead latents, thresholds
        sae.project_gradients()
        optimizer.step()
        sae.after_step()  # unit decoder rows

print({name: round(float(loss.detach()), 4) for name, loss in losses.items()})
sae_core.save(sae.eval(), "custom_loop_sae")  # load_sae and SAELens read it
