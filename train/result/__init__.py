"""The end of a run: evaluation, files, summary."""
