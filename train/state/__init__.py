"""The state of one SAE in training, and its checkpoints."""
