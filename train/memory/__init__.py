"""Memory and disk requirements of a run."""
