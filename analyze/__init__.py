"""SAE and cache -> sparse codes, statistics, evaluation, report."""
