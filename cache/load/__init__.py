"""Shuffled batches of a cache on a device."""
