"""Train SAEs from an activation cache: `sae-train`, and from Python `train_sae`, `train_sweep` and their `resume_*`.

loop.py        one training step
trainer.py     everything around the steps of one run
lockstep.py    several trainers on one stream of batches
run.py         from settings to runs/<name>/, and from a checkpoint onwards
callbacks.py   what user code can follow
"""
