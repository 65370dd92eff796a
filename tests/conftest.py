"""What several test files share: a real model without a hub, two threads, no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"
# Tests run in two processes; more threads than cores slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
