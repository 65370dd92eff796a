"""Publishing a finished SAE: files of other tools, the model hub."""
