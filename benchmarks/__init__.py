"""Throughput of every stage beside the limit of the machine it runs on. `python -m benchmarks` or `make bench`."""
