"""SAEs trained on rows whose features are known. `python -m benchmarks.ground_truth`; README.md says what to expect."""
