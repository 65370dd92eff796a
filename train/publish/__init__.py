"""A finished SAE for others: files of other tools, the model hub."""
