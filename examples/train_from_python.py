"""Train from Python, then again with other settings: python examples/train_from_python.py [CACHE]"""

import sys
from dataclasses import replace

from sae_granary import load_sae, train_sae
from sae_granary.train.config.settings import TrainConfig

CACHE = sys.argv[1] if len(sys.argv) > 1 else "cache/demo_l3"

config = TrainConfig(cache=CACHE, type="batchtopk", steps=50, batch_size=1024, options={"k": 8})
first = train_sae(config, name="python_first", overwrite=True)
print(first.folder, first.summary["eval"])

# Settings are frozen: `replace` makes another config; plain keywords do the same in one go.
second = train_sae(
    replace(config, init_from=str(first.folder), optimizer="muon"), lr=1e-4, name="python_second", overwrite=True
)
print(f"FVU {first.summary['eval']['fvu']:.4f} -> {second.summary['eval']['fvu']:.4f}")

sae = load_sae(second.folder)
print(f"{sae.type_name} with {sae.config.d_sae} latents, decoder {tuple(sae.W_dec.shape)}")
