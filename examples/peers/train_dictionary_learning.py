"""Train dictionary_learning's own trainer from a cache: python examples/peers/train_dictionary_learning.py [CACHE]"""

import sys

from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE

from sae_granary import BatchDataset, open_cache

CACHE = sys.argv[1] if len(sys.argv) > 1 else "cache/demo_l3"

N_STEPS = 50
rows = open_cache(CACHE)
d_in = rows.hook().d_in
trainer = {
    "trainer": TopKTrainer,
    "dict_class": AutoEncoderTopK,
    "activation_dim": d_in,
    "dict_size": 8 * d_in,
    "k": 8,
    "steps": N_STEPS,
    "layer": 3,
    "lm_name": "demo",
    "device": "cpu",
    "warmup_steps": 5,
}
trainSAE(
    BatchDataset(rows, batch_size=256),
    [trainer],
    steps=N_STEPS,
    save_dir="dictionary_learning_sae",
    device="cpu",
)
print(f"dictionary_learning trained on {N_STEPS * 256:,} rows")
