"""Everything that changes while one SAE trains, and its checkpoints."""
