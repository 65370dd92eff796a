"""Text to activations on disk: stream documents through a transformer and write a cache."""
