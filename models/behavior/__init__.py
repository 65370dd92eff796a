"""Checks of a loaded model: whether padding, batch mates or earlier passes change its rows."""
