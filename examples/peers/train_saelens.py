"""Train SAELens' own trainer from a cache: python examples/peers/train_saelens.py [CACHE]"""

import sys

from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from sae_granary import batches, open_cache

CACHE = sys.argv[1] if len(sys.argv) > 1 else "cache/demo_l3"

BATCH_SIZE, N_STEPS = 256, 50
rows = open_cache(CACHE)
d_in = rows.hook().d_in
sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=d_in, d_sae=8 * d_in, l1_coefficient=1.0))
config = SAETrainerConfig(
    total_training_samples=N_STEPS * BATCH_SIZE, train_batch_size_samples=BATCH_SIZE, lr=3e-4, lr_end=3e-4
)
with batches(rows, batch_size=BATCH_SIZE) as loader:  # endless and shuffled; `device="cuda"` puts them on a GPU
    trained = SAETrainer(cfg=config, sae=sae, data_provider=(batch.x for batch in loader)).fit()

print(f"SAELens trained on {N_STEPS * BATCH_SIZE:,} rows")
trained.save_model("saelens_sae")  # load_sae reads it
